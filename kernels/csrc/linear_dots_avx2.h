// Integer dots of a weight block with AVX2. See linear_tile.h, and linear_dots_generic.h for the meaning.
//
// One row reads nibbles as they come; more rows read an unpacked copy. HR_KEEP stops GCC from hoisting all products out
// of the accumulation and spilling them, which more than halves the speed.
#pragma once

#include <utility>

#include "activations.h"

#define HR_KEEP(v) __asm__("" : "+x"(v))

namespace headrace::HR_ISA {

constexpr int kMaxColumns = 4;
constexpr bool kUnpacksNibbles = true;
constexpr bool kUnpacksWords = true;

inline void unpack_nibbles(const uint8_t* from, uint8_t* to) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int at = 0; at < 256; at += 32) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)(from + at));
    _mm256_store_si256((__m256i*)(to + at), _mm256_and_si256(both, mask));
    _mm256_store_si256((__m256i*)(to + at + 256), _mm256_and_si256(_mm256_srli_epi16(both, 4), mask));
  }
}

// A block as int16 less `offset`: what 16-bit activations are multiplied with. Splitting bytes in the tile, again for
// every four rows, took a sixth of its vector instructions.
inline void unpack_words(const uint8_t* from, bool is_nibbles, int offset, uint8_t* to) {
  const __m256i nibble = _mm256_set1_epi8(15), low = _mm256_set1_epi16(255);
  const __m256i less = _mm256_set1_epi16((int16_t)offset);
  for (int at = 0; at < 512; at += 32) {
    __m256i bytes = _mm256_loadu_si256((const __m256i*)(from + (is_nibbles ? at & 255 : at)));
    if (is_nibbles) bytes = _mm256_and_si256(at < 256 ? bytes : _mm256_srli_epi16(bytes, 4), nibble);
    uint8_t* words = to + (at & ~63) * 2 + (at & 32);
    _mm256_store_si256((__m256i*)words, _mm256_sub_epi16(_mm256_and_si256(bytes, low), less));
    _mm256_store_si256((__m256i*)(words + 64), _mm256_sub_epi16(_mm256_srli_epi16(bytes, 8), less));
  }
}

// Features 4 g .. 4 g + 3 of 8 rows as bytes; `half` 0: rows 0..7.
template <Format kFormat>
inline __m256i weights_at(const uint8_t* q, int g, int half) {
  if (kFormat != Format::kNibbles) return _mm256_loadu_si256((const __m256i*)(q + 64 * g + 32 * half));
  __m256i both = _mm256_loadu_si256((const __m256i*)(q + 64 * (g & 3) + 32 * half));
  if (g >= 4) both = _mm256_srli_epi16(both, 4);
  return _mm256_and_si256(both, _mm256_set1_epi8(15));
}

inline __m256i broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm256_set1_epi32(four);
}

// -offset times the sum of the activations of a part.
template <int kFirst, int kLast>
inline int32_t correction(const ActivationHeader& header, int column, int32_t offset) {
  int32_t neg8 = header.neg8_sum[column];
  if (kFirst == 4) neg8 = header.neg8_sum_high[column];
  if (kLast == 4) neg8 -= header.neg8_sum_high[column];
  return neg8 * (offset / 8);
}

// One step of 4 features: into 16-bit sums of pairs for small weights (at most 8 * 2 * 15 * 127 = 30480), else into the
// 32-bit sums.
template <Format kFormat, int kBits>
inline void accumulate(__m256i& sum, __m256i w, const uint8_t* x) {
  if (kBits == 16) {
    const __m256i even = _mm256_and_si256(w, _mm256_set1_epi32(0x00FF00FF)), odd = _mm256_srli_epi16(w, 8);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(even, broadcast4(x)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(odd, broadcast4(x + 4)));
  } else if (kFormat == Format::kBytes) {  // |q| <= 128 as unsigned, q's sign on the activation: pairs up to 32512
    const __m256i signed_x = _mm256_sign_epi8(broadcast4(x), w);
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), signed_x);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  } else {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, broadcast4(x)));
  }
  HR_KEEP(sum);
}

// block_dots of 16-bit weights and activations.
template <int kFirst, int kLast, int kRows>
inline void word_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  __m256i sums[kRows][2];
  for (int c = 0; c < kRows; c++) sums[c][0] = sums[c][1] = _mm256_setzero_si256();
#pragma GCC unroll 16
  for (int pair = 2 * kFirst; pair < 2 * kLast; pair++) {
    __m256i low = _mm256_loadu_si256((const __m256i*)(q + 64 * pair));
    __m256i high = _mm256_loadu_si256((const __m256i*)(q + 64 * pair + 32));
    HR_KEEP(low);
    HR_KEEP(high);
#pragma GCC unroll 4
    for (int c = 0; c < kRows; c++) {
      const __m256i x =
          broadcast4(a[c / 4] + sizeof(ActivationHeader) + 32 * (pair / 2) + 8 * (c % 4) + 4 * (pair % 2));
      sums[c][0] = _mm256_add_epi32(sums[c][0], _mm256_madd_epi16(low, x));
      HR_KEEP(sums[c][0]);
      sums[c][1] = _mm256_add_epi32(sums[c][1], _mm256_madd_epi16(high, x));
      HR_KEEP(sums[c][1]);
    }
  }
  for (int c = 0; c < kRows; c++) d[c] = {_mm256_cvtepi32_ps(sums[c][0]), _mm256_cvtepi32_ps(sums[c][1])};
}

template <Format kFormat, int kBits, bool kZeros, int kFirst, int kLast, int kRows>
inline void block_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
  if constexpr (kFormat == Format::kWords) return word_dots<kFirst, kLast, kRows>(q, a, d);
  constexpr bool kIsSigned = kFormat == Format::kBytes && kBits == 8;
  constexpr int32_t kOffset = kIsSigned ? 0 : kFormat == Format::kBytes ? 128 : kZeros ? 0 : 8;
  __m256i sums[kRows][2];
  for (int c = 0; c < kRows; c++) sums[c][0] = sums[c][1] = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int g = kFirst; g < kLast; g++) {
    __m256i low = weights_at<kFormat>(q, g, 0), high = weights_at<kFormat>(q, g, 1);
    if (kIsSigned) {
      low = _mm256_xor_si256(low, _mm256_set1_epi8(-128));
      high = _mm256_xor_si256(high, _mm256_set1_epi8(-128));
    }
    HR_KEEP(low);
    HR_KEEP(high);
#pragma GCC unroll 4
    for (int c = 0; c < kRows; c++) {
      const uint8_t* x = a[c / 4] + sizeof(ActivationHeader) + (2 * g * kBits) + (c % 4) * (kBits / 2);
      accumulate<kFormat, kBits>(sums[c][0], low, x);
      accumulate<kFormat, kBits>(sums[c][1], high, x);
    }
  }
  for (int c = 0; c < kRows; c++) {
    __m256i low = sums[c][0], high = sums[c][1];
    if (kBits == 8 && kFormat != Format::kBytes) {
      low = _mm256_madd_epi16(low, _mm256_set1_epi16(1));
      high = _mm256_madd_epi16(high, _mm256_set1_epi16(1));
    }
    if (kOffset) {
      const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
      const __m256i add = _mm256_set1_epi32(correction<kFirst, kLast>(header, c % 4, kOffset));
      low = _mm256_add_epi32(low, add);
      high = _mm256_add_epi32(high, add);
    }
    d[c] = {_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high)};
  }
}

}  // namespace headrace::HR_ISA

#undef HR_KEEP
