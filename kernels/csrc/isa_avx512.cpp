// AVX-512 F, BW, VL, DQ. See isa_body.h.
#define HR_ISA avx512
#define HR_ISA_AVX512 1
#include "isa_body.h"

const headrace::KernelTable* headrace::avx512_kernels() { return &headrace::avx512::kTable; }
