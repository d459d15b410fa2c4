// Sixteen float lanes with one meaning on every instruction set: the kernels are written over these, so that AVX2,
// AVX-512, NEON and plain C++ give the same bits. Included by the kernel headers inside an isa_*.cpp only.
//
// The rules that make it so: multiply-adds are explicit and fused everywhere; sums across lanes use one tree
// (16 -> 8 -> 4 -> 2 -> 1, halves added); conversions round to nearest, ties to even. Each isa_*.cpp defines HR_ISA (a
// namespace, so that the linker never merges code compiled for different instruction sets) and one of
// HR_ISA_{GENERIC,AVX2,AVX512,NEON}; HR_HAS_VNNI adds vpdpbusd to AVX-512.
#pragma once

#if defined(HR_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(HR_ISA_AVX2)
#include "simd_avx2.h"
#elif defined(HR_ISA_NEON)
#include "simd_neon.h"
#elif defined(HR_ISA_GENERIC)
#include "simd_generic.h"
#else
#error "an isa_*.cpp must say which instruction set it is for"
#endif
