// Integer dots of a weight block with AVX-512, with and without VNNI. See linear_tile.h, and linear_dots_generic.h for
// the meaning. A vector holds 4 features of all 16 rows; unpacking nibbles in registers is cheaper than reading an
// unpacked copy.
#pragma once

#include <utility>

#include "activations.h"

#define HR_KEEP(v) __asm__("" : "+v"(v))

namespace headrace::HR_ISA {

constexpr int kMaxColumns = 8;
constexpr bool kUnpacksNibbles = false;
constexpr bool kUnpacksWords = false;

inline void unpack_nibbles(const uint8_t*, uint8_t*) {}           // never called
inline void unpack_words(const uint8_t*, bool, int, uint8_t*) {}  // never called

// Features 4 g .. 4 g + 3 of the 16 rows as bytes.
template <Format kFormat>
inline __m512i weights_at(const uint8_t* q, int g) {
  if (kFormat != Format::kNibbles) return _mm512_loadu_si512(q + 64 * g);
  __m512i both = _mm512_loadu_si512(q + 64 * (g & 3));
  if (g >= 4) both = _mm512_srli_epi16(both, 4);
  return _mm512_and_si512(both, _mm512_set1_epi8(15));
}

inline __m512i broadcast4(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_set1_epi32(four);
}

// -offset times the sum of the activations of a part.
template <int kFirst, int kLast>
inline int32_t correction(const ActivationHeader& header, int column, int32_t offset) {
  int32_t neg8 = header.neg8_sum[column];
  if (kFirst == 4) neg8 = header.neg8_sum_high[column];
  if (kLast == 4) neg8 -= header.neg8_sum_high[column];
  return neg8 * (offset / 8);
}

// One step of 4 features.
template <Format kFormat, int kBits>
inline void accumulate(__m512i& sum, __m512i w, const uint8_t* x) {
#if defined(HR_HAS_VNNI)
  if (kBits == 16) {
    const __m512i even = _mm512_and_si512(w, _mm512_set1_epi32(0x00FF00FF)), odd = _mm512_srli_epi16(w, 8);
    sum = _mm512_dpwssd_epi32(sum, even, broadcast4(x));
    sum = _mm512_dpwssd_epi32(sum, odd, broadcast4(x + 4));
  } else {
    sum = _mm512_dpbusd_epi32(sum, w, broadcast4(x));
  }
#else
  if (kBits == 16) {
    const __m512i even = _mm512_and_si512(w, _mm512_set1_epi32(0x00FF00FF)), odd = _mm512_srli_epi16(w, 8);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, broadcast4(x)));
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(odd, broadcast4(x + 4)));
  } else if (kFormat == Format::kBytes) {  // |q| <= 128 as unsigned, q's sign on the activation: pairs up to 32512
    const __mmask64 negative = _mm512_movepi8_mask(w);
    const __m512i v = broadcast4(x), signed_x = _mm512_mask_sub_epi8(v, negative, _mm512_setzero_si512(), v);
    const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), signed_x);
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  } else {  // 16-bit sums of pairs: at most 8 * 2 * 15 * 127 = 30480
    sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16(w, broadcast4(x)));
  }
#endif
  HR_KEEP(sum);
}

template <Format kFormat, int kBits, bool kZeros, int kFirst, int kLast, int kRows>
inline void block_dots(const uint8_t* q, const uint8_t* const* a, F32x16 (&d)[kRows]) {
#if defined(HR_HAS_VNNI)
  constexpr bool kIsSigned = false, kIsPaired = false;
#else
  constexpr bool kIsSigned = kFormat == Format::kBytes && kBits == 8;
  constexpr bool kIsPaired = kFormat != Format::kBytes && kBits == 8;
#endif
  constexpr int32_t kOffset = kIsSigned ? 0 : kFormat == Format::kBytes ? 128 : kZeros ? 0 : 8;
  __m512i sums[kRows];
  for (int c = 0; c < kRows; c++) {
    const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
    sums[c] = _mm512_setzero_si512();
    if (kOffset && !kIsPaired) sums[c] = _mm512_set1_epi32(correction<kFirst, kLast>(header, c % 4, kOffset));
  }
#pragma GCC unroll 8
  for (int g = kFirst; g < kLast; g++) {
    __m512i w = weights_at<kFormat>(q, g);
    if (kIsSigned) w = _mm512_xor_si512(w, _mm512_set1_epi8(-128));
    HR_KEEP(w);
#pragma GCC unroll 8
    for (int c = 0; c < kRows; c++) {
      const uint8_t* x = a[c / 4] + sizeof(ActivationHeader) + (2 * g * kBits) + (c % 4) * (kBits / 2);
      accumulate<kFormat, kBits>(sums[c], w, x);
    }
  }
  for (int c = 0; c < kRows; c++) {
    __m512i sum = sums[c];
    if (kIsPaired) {
      const ActivationHeader& header = *(const ActivationHeader*)a[c / 4];
      sum = _mm512_madd_epi16(sum, _mm512_set1_epi16(1));
      if (kOffset) sum = _mm512_add_epi32(sum, _mm512_set1_epi32(correction<kFirst, kLast>(header, c % 4, kOffset)));
    }
    d[c] = {_mm512_cvtepi32_ps(sum)};
  }
}

}  // namespace headrace::HR_ISA

#undef HR_KEEP
