// Plain C++: the meaning of the kernels, for any machine. See isa_body.h.
#define HR_ISA generic
#define HR_ISA_GENERIC 1
#include "isa_body.h"

const headrace::KernelTable* headrace::generic_kernels() { return &headrace::generic::kTable; }
