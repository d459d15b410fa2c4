// AVX2 with FMA and F16C. See isa_body.h.
#define HR_ISA avx2
#define HR_ISA_AVX2 1
#include "isa_body.h"

const headrace::KernelTable* headrace::avx2_kernels() { return &headrace::avx2::kTable; }
