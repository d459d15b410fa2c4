// Integer dots of a weight block in plain C++: the oracle of linear_dots_{avx2,avx512,neon}.h. See linear_tile.h.
#pragma once

#include <utility>

#include "activations.h"

namespace headrace::HR_ISA {

constexpr int kMaxColumns = 4;  // rows of activations in a tile
constexpr bool kUnpacksNibbles = false;

inline void unpack_nibbles(const uint8_t*, uint8_t*) {}  // never called

// Feature `k` of a row's group in an activation block.
template <int kBits>
inline int32_t activation_at(const uint8_t* block, int column, int k) {
  const uint8_t* data = block + sizeof(ActivationHeader);
  if (kBits == 8) return ((const int8_t*)data)[16 * (k / 4) + 4 * column + k % 4];
  constexpr int kPlace[4] = {0, 2, 1, 3};
  return ((const int16_t*)data)[16 * (k / 4) + 4 * column + kPlace[k % 4]];
}

// d[c] = dot of features [4 kFirst, 4 kLast) of the block's 16 rows and activation row c, as floats. a: one activation
// block for every four rows. Without zeros int4 is q - 8; int8 is signed always.
template <Format kFormat, int kBits, bool kZeros, int kFirst, int kLast, int kRows>
inline void block_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  constexpr int32_t kOffset = kFormat == Format::kBytes ? 128 : kZeros ? 0 : 8;
  for (int c = 0; c < kRows; c++) {
    int32_t dots[kLanes] = {};
    for (int k = 4 * kFirst; k < 4 * kLast; k++) {
      const int32_t x = activation_at<kBits>(a[c / 4], c % 4, k);
      for (int r = 0; r < kLanes; r++) {
        int32_t w;
        if (kFormat == Format::kNibbles) {
          w = q[64 * (k % 16 / 4) + 4 * r + k % 4] >> (k < 16 ? 0 : 4) & 15;
        } else {
          w = q[64 * (k / 4) + 4 * r + k % 4];
        }
        dots[r] += (w - kOffset) * x;
      }
    }
    d[c] = load_i32(dots);
  }
}

}  // namespace headrace::HR_ISA
