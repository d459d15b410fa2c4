// Armv8.2 NEON with dot product and half precision. See isa_body.h.
#define HR_ISA neon
#define HR_ISA_NEON 1
#include "isa_body.h"

const headrace::KernelTable* headrace::neon_kernels() { return &headrace::neon::kTable; }
