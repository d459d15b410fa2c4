// Products of a block of a super-block by dots of linear_dots_*.h: plain C++, AVX-512 and NEON, and AVX2 with 16-bit
// activations. float(dot) * float(scale), exact or rounded once. See linear_super.h.
#pragma once

#include "linear_super.h"

namespace headrace::HR_ISA {

// d[c] = dot of features [4 kFirst, 4 kLast) of a block. q: as packed, or bytes q + 128. Each instruction set has its
// own.
template <WeightKind kKind, int kBits, bool kPacked, int kFirst, int kLast, int kRows>
inline void part_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]);

// n as linear_super.h says, of the whole block or, where that has two, of one part.
template <WeightKind kKind, int kBits, bool kPacked, int kPart, int kRows>
inline void float_super_dots(const SuperBlock& super, const uint8_t* q, int block, const uint8_t* const* a,
                             F32x16 (&n)[kRows]) {
  constexpr bool kIsSigned = kKind == WeightKind::kSuper6;
  if constexpr (kKind == WeightKind::kSuper4 || (kBits == 8 && !kIsSigned)) {
    part_dots<kKind, kBits, kPacked, 0, 8, kRows>(q, a, n);
    const F32x16 scale = load(super.scales[block]);
    for (int c = 0; c < kRows; c++) n[c] = mul(n[c], scale);
  } else if constexpr (kBits == 8) {  // both parts: exact
    part_dots<kKind, kBits, kPacked, 0, 4, kRows>(q, a, n);
    const F32x16 scale = load(super.scales[2 * block]), scale_high = load(super.scales[2 * block + 1]);
    for (int c = 0; c < kRows; c++) n[c] = mul(n[c], scale);
    F32x16 high[kRows];
    part_dots<kKind, kBits, kPacked, 4, 8, kRows>(q, a, high);
    for (int c = 0; c < kRows; c++) n[c] = fma(high[c], scale_high, n[c]);
  } else {
    part_dots<kKind, kBits, kPacked, 4 * kPart, 4 * kPart + 4, kRows>(q, a, n);
    const F32x16 scale = load(super.scales[kIsSigned ? 2 * block + kPart : block]);
    for (int c = 0; c < kRows; c++) n[c] = mul(n[c], scale);
  }
}

}  // namespace headrace::HR_ISA
