// Super-blocks in plain C++, for the oracle and NEON. See linear_super.h.
#pragma once

#include "linear_super_dots.h"

namespace headrace::HR_ISA {

inline F32x16 load_u8(const uint8_t* p) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; i++) lanes[i] = (float)p[i];
  return load(lanes);
}

inline void expand_super_scales(WeightKind kind, int32_t, const uint8_t* from, SuperBlock& to) {
  for (int part = 0; part < super_parts(kind); part++, from += kLanes)
    store(to.scales[part], kind == WeightKind::kSuper6 ? load_i8((const int8_t*)from) : load_u8(from));
}

// q + 128 as bytes, which is what Format::kBytes means; never called for kSuper4, whose nibbles are read as they are.
inline void expand_super_integers(WeightKind kind, int32_t, const uint8_t* from, uint8_t* to) {
  const int bias = kind == WeightKind::kSuper6 ? 128 - 32 : 128;
  for (int block = 0; block < 8; block++, from += super_block_bytes(kind)) {
    for (int g = 0; g < 8; g++, to += 64) {
      for (int i = 0; i < 64; i++) to[i] = (uint8_t)(super_weight(kind, from, i / 4, 4 * g + i % 4) + bias);
    }
  }
}

// How many rows a tile has at most that reads q as they are packed: nibbles always, others never.
template <WeightKind kKind, int kBits>
constexpr int kMostPacked = kKind == WeightKind::kSuper4 ? kMaxColumns : 0;

template <WeightKind kKind, int kBits, bool kPacked, int kFirst, int kLast, int kRows>
inline void part_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  block_dots<kPacked ? Format::kNibbles : Format::kBytes, kBits, true, kFirst, kLast, kRows>(q, a, d);
}

template <WeightKind kKind, int kBits, bool kPacked, int kPart, int kRows>
inline void super_dots(const SuperBlock& super, const uint8_t* q, int block, const uint8_t* const* a,
                       F32x16 (&n)[kRows]) {
  float_super_dots<kKind, kBits, kPacked, kPart, kRows>(super, q, block, a, n);
}

}  // namespace headrace::HR_ISA
