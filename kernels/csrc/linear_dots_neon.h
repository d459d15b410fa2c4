// Integer dots of a weight block with NEON's dot product. See linear_tile.h, and linear_dots_generic.h for the meaning.
// A vector holds 4 features of 4 rows. sdot takes signed bytes: nibbles are that as they are, q + 128 is q with its top
// bit turned.
#pragma once

#include <utility>

#include "activations.h"

namespace headrace::HR_ISA {

constexpr int kMaxColumns = 4;  // rows of activations in a tile: 16 sums of 32 registers
constexpr bool kUnpacksNibbles = false;
constexpr bool kUnpacksWords = false;

inline void unpack_nibbles(const uint8_t*, uint8_t*) {}           // never called
inline void unpack_words(const uint8_t*, bool, int, uint8_t*) {}  // never called

// Features 4 g .. 4 g + 3 of rows 4 i .. 4 i + 3, signed.
template <Format kFormat>
inline int8x16_t weights_at(const uint8_t* q, int g, int i) {
  if (kFormat != Format::kNibbles) return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(q + 64 * g + 16 * i), vdupq_n_u8(128)));
  const uint8x16_t both = vld1q_u8(q + 64 * (g & 3) + 16 * i);
  return vreinterpretq_s8_u8(g < 4 ? vandq_u8(both, vdupq_n_u8(15)) : vshrq_n_u8(both, 4));
}

template <Format kFormat, int kFirst, int kLast, int kRows>
inline void dots_of_8_bits(const uint8_t* q, const uint8_t* x, int32x4_t (&sums)[kRows][4]) {
  for (int g = kFirst; g < kLast; g++) {
    const int8x16_t rows = vld1q_s8((const int8_t*)x + 16 * g);  // 4 features of each of 4 rows
    for (int i = 0; i < 4; i++) {
      const int8x16_t w = weights_at<kFormat>(q, g, i);
      sums[0][i] = vdotq_laneq_s32(sums[0][i], w, rows, 0);
      if constexpr (kRows > 1) sums[1][i] = vdotq_laneq_s32(sums[1][i], w, rows, 1);
      if constexpr (kRows > 2) sums[2][i] = vdotq_laneq_s32(sums[2][i], w, rows, 2);
      if constexpr (kRows > 3) sums[3][i] = vdotq_laneq_s32(sums[3][i], w, rows, 3);
    }
  }
}

// Each product of a pair goes to a lane of its own: low[i] and high[i] hold rows 4 i, 4 i + 1 and 4 i + 2, 4 i + 3.
inline void accumulate_16_bits(int32x4_t& low, int32x4_t& high, int8x16_t w, const uint8_t* x) {
  int32_t pairs[2];
  std::memcpy(pairs, x, 8);
  const int16x8_t even_x = vreinterpretq_s16_s32(vdupq_n_s32(pairs[0]));
  const int16x8_t odd_x = vreinterpretq_s16_s32(vdupq_n_s32(pairs[1]));
  const int16x8_t words = vreinterpretq_s16_s8(w);
  const int16x8_t even = vshrq_n_s16(vshlq_n_s16(words, 8), 8), odd = vshrq_n_s16(words, 8);
  low = vmlal_s16(low, vget_low_s16(even), vget_low_s16(even_x));
  high = vmlal_high_s16(high, even, even_x);
  low = vmlal_s16(low, vget_low_s16(odd), vget_low_s16(odd_x));
  high = vmlal_high_s16(high, odd, odd_x);
}

template <Format kFormat, int kFirst, int kLast, int kRows>
inline void dots_of_16_bits(const uint8_t* q, const uint8_t* x, int32x4_t (&sums)[kRows][4]) {
  for (int i = 0; i < 4; i++) {
    int32x4_t low[kRows], high[kRows];
    for (int c = 0; c < kRows; c++) low[c] = high[c] = vdupq_n_s32(0);
    for (int g = kFirst; g < kLast; g++) {
      const int8x16_t w = weights_at<kFormat>(q, g, i);
      for (int c = 0; c < kRows; c++) accumulate_16_bits(low[c], high[c], w, x + 32 * g + 8 * c);
    }
    for (int c = 0; c < kRows; c++) sums[c][i] = vpaddq_s32(low[c], high[c]);
  }
}

template <Format kFormat, int kBits, bool kZeros, int kFirst, int kLast, int kRows>
inline void block_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  static_assert(kRows <= 4, "a tile is one block of activations");
  constexpr bool kIsOffset = kFormat != Format::kBytes && !kZeros;  // by 8
  const ActivationHeader& header = *(const ActivationHeader*)a[0];
  const uint8_t* x = a[0] + sizeof(ActivationHeader);
  int32x4_t sums[kRows][4];
  if (kBits == 8) {
    for (int c = 0; c < kRows; c++)
      for (int i = 0; i < 4; i++) sums[c][i] = vdupq_n_s32(0);
    dots_of_8_bits<kFormat, kFirst, kLast, kRows>(q, x, sums);
  } else {
    dots_of_16_bits<kFormat, kFirst, kLast, kRows>(q, x, sums);
  }
  for (int c = 0; c < kRows; c++) {
    int32_t neg8 = 0;
    if (kIsOffset) {
      neg8 = kFirst == 4 ? header.neg8_sum_high[c] : header.neg8_sum[c];
      if (kLast == 4) neg8 -= header.neg8_sum_high[c];
    }
    for (int i = 0; i < 4; i++) d[c].q[i] = vcvtq_f32_s32(vaddq_s32(sums[c][i], vdupq_n_s32(neg8)));
  }
}

}  // namespace headrace::HR_ISA
