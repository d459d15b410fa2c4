// Integer dots of a weight block in plain C++: the oracle of linear_dots_{avx2,avx512,neon}.h. See linear_tile.h.
#pragma once

#include <utility>

#include "activations.h"

namespace headrace::HR_ISA {

constexpr int kMaxColumns = 4;  // rows of activations in a tile
constexpr bool kUnpacksNibbles = false;
constexpr bool kUnpacksWords = false;

inline void unpack_nibbles(const uint8_t*, uint8_t*) {}           // never called
inline void unpack_words(const uint8_t*, bool, int, uint8_t*) {}  // never called

// The features of one row in an activation block, int32 [32].
template <int kBits>
inline void widen_activations(const uint8_t* block, int column, int32_t* x) {
  constexpr int kPlace[4] = {0, 2, 1, 3};
  const uint8_t* data = block + sizeof(ActivationHeader);
  for (int k = 0; k < kGroup; k++) {
    if (kBits == 8) {
      x[k] = ((const int8_t*)data)[16 * (k / 4) + 4 * column + k % 4];
    } else {
      x[k] = ((const int16_t*)data)[16 * (k / 4) + 4 * column + kPlace[k % 4]];
    }
  }
}

// dots[r] = sum of (w - offset) * x over features [4 first, 4 last).
template <Format kFormat>
inline void dots_of_row(const uint8_t* q, const int32_t* x, int32_t offset, int first, int last, int32_t* dots) {
  for (int r = 0; r < kLanes; r++) dots[r] = 0;
  for (int g = first; g < last; g++) {
    const uint8_t* w = q + 64 * (kFormat == Format::kNibbles ? g & 3 : g);
    const int shift = kFormat == Format::kNibbles && g >= 4 ? 4 : 0, mask = kFormat == Format::kNibbles ? 15 : 255;
    for (int r = 0; r < kLanes; r++) {
      for (int j = 0; j < 4; j++) dots[r] += ((w[4 * r + j] >> shift & mask) - offset) * x[4 * g + j];
    }
  }
}

// d[c] = dot of features [4 kFirst, 4 kLast) of the block's 16 rows and activation row c, as floats. a: one activation
// block for every four rows. Without zeros int4 is q - 8; int8 is signed always.
template <Format kFormat, int kBits, bool kZeros, int kFirst, int kLast, int kRows>
inline void block_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  constexpr int32_t kOffset = kFormat == Format::kBytes ? 128 : kZeros ? 0 : 8;
  for (int c = 0; c < kRows; c++) {
    int32_t x[kGroup], dots[kLanes];
    widen_activations<kBits>(a[c / 4], c % 4, x);
    dots_of_row<kFormat>(q, x, kOffset, kFirst, kLast, dots);
    d[c] = load_i32(dots);
  }
}

}  // namespace headrace::HR_ISA
