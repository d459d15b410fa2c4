// AVX-512 with VNNI: integer dot products in one instruction. See isa_body.h.
#define HR_ISA avx512vnni
#define HR_ISA_AVX512 1
#define HR_HAS_VNNI 1
#include "isa_body.h"

const headrace::KernelTable* headrace::avx512vnni_kernels() { return &headrace::avx512vnni::kTable; }
