// What sampling computes beyond simd.h and vector_math.h: comparisons to masks, packing, log, the order of ranks.
// Included by sample_select.h and sample_draw.h. Arithmetic of IEEE 754 alone, so the bits depend on no C library.
#pragma once

#include <cstdint>
#include <cstring>

#include "simd.h"
#include "vector_math.h"

namespace headrace::HR_ISA {

// Lanes where a >= b; never where one is NaN.
#if defined(HR_ISA_AVX512)
inline Mask16 at_least(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
#elif defined(HR_ISA_AVX2)
inline Mask16 at_least(F32x16 a, F32x16 b) {
  int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ));
  int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ));
  return (Mask16)(lo | hi << 8);
}
#else
inline Mask16 at_least(F32x16 a, F32x16 b) {
  float x[16], y[16];
  store(x, a);
  store(y, b);
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= (unsigned)(x[i] >= y[i]) << i;
  return (Mask16)mask;
}
#endif

// (2^32 - 1 - word) >> 8, as floats: exact.
inline F32x16 complement_24(const uint32_t* words) {
#if defined(HR_ISA_AVX512)
  __m512i w = _mm512_loadu_si512(words);
  return {_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_xor_si512(w, _mm512_set1_epi32(-1)), 8))};
#else
  int32_t complements[16];
  for (int i = 0; i < 16; i++) complements[i] = (int32_t)(~words[i] >> 8);
  return load_i32(complements);
#endif
}

// Append the lanes of `mask` and their ids, first_id + lane, at [n]; up to 16 entries behind are overwritten as well.
inline int append(Mask16 mask, F32x16 values, int32_t first_id, float* out, int32_t* ids, int n) {
#if defined(HR_ISA_AVX512)
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_storeu_ps(out + n, _mm512_maskz_compress_ps(mask, values.v));
  _mm512_storeu_si512(ids + n, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(first_id))));
  return n + __builtin_popcount(mask);
#else
  float x[16];
  store(x, values);
  for (unsigned rest = mask; rest; rest &= rest - 1) {
    int lane = __builtin_ctz(rest);
    out[n] = x[lane];
    ids[n++] = first_id + lane;
  }
  return n;
#endif
}

// log x for a normal x > 0: 2 atanh(s) of the mantissa in [sqrt(1/2), sqrt(2)], s = (m - 1) / (m + 1), s^2 < 0.0295, to
// the term s^23 / 23. Within two units in the last place, also where x is close to 1.
inline double log_of(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  int exponent = (int)(bits >> 52) - 1023;
  bits = (bits & 0xFFFFFFFFFFFFFull) | 0x3FF0000000000000ull;
  double m;
  std::memcpy(&m, &bits, 8);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    exponent++;
  }
  double f = m - 1.0, s = f / (2.0 + f), z = s * s;
  double sum = 2.0 / 23.0;
  for (int k = 21; k >= 3; k -= 2) sum = sum * z + 2.0 / k;
  // ln 2 in two parts; the first times an exponent is exact.
  return exponent * 0.693147180369123816490 + (2.0 * s + (s * z * sum + exponent * 1.90821492927058770002e-10));
}

// Sums of float32 lanes in float64: lanes stay apart until the end, so the order is the same everywhere.
class LaneSums {
 public:
#if defined(HR_ISA_AVX512)
  void add(F32x16 a) {
    lo_ = _mm512_add_pd(lo_, _mm512_cvtps_pd(_mm512_castps512_ps256(a.v)));
    hi_ = _mm512_add_pd(hi_, _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)));
  }

 private:
  void store_to(double* sums) const {
    _mm512_storeu_pd(sums, lo_);
    _mm512_storeu_pd(sums + 8, hi_);
  }
  __m512d lo_ = _mm512_setzero_pd(), hi_ = _mm512_setzero_pd();
#elif defined(HR_ISA_AVX2)
  void add(F32x16 a) {  // not in a loop: the compiler would keep the sums in memory
    v0_ = _mm256_add_pd(v0_, _mm256_cvtps_pd(_mm256_castps256_ps128(a.lo)));
    v1_ = _mm256_add_pd(v1_, _mm256_cvtps_pd(_mm256_extractf128_ps(a.lo, 1)));
    v2_ = _mm256_add_pd(v2_, _mm256_cvtps_pd(_mm256_castps256_ps128(a.hi)));
    v3_ = _mm256_add_pd(v3_, _mm256_cvtps_pd(_mm256_extractf128_ps(a.hi, 1)));
  }

 private:
  void store_to(double* sums) const {
    _mm256_storeu_pd(sums, v0_);
    _mm256_storeu_pd(sums + 4, v1_);
    _mm256_storeu_pd(sums + 8, v2_);
    _mm256_storeu_pd(sums + 12, v3_);
  }
  __m256d v0_ = _mm256_setzero_pd(), v1_ = _mm256_setzero_pd();
  __m256d v2_ = _mm256_setzero_pd(), v3_ = _mm256_setzero_pd();
#else
  void add(F32x16 a) {
    float x[16];
    store(x, a);
    for (int i = 0; i < 16; i++) v_[i] += x[i];
  }

 private:
  void store_to(double* sums) const { std::memcpy(sums, v_, sizeof v_); }
  double v_[16] = {};
#endif

 public:
  double total() const {
    double sums[16];
    store_to(sums);
    for (int n = 8; n >= 1; n /= 2)
      for (int i = 0; i < n; i++) sums[i] += sums[i + n];
    return sums[0];
  }
};

// Unsigned integers in the order of floats; 0.0 and -0.0 are one, NaN must not occur.
inline uint32_t order_key(float x) {
  x += 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
inline float from_order_key(uint32_t key) {
  uint32_t bits = key >> 31 ? key & 0x7FFFFFFFu : ~key;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A token's place in the ranks, smallest first: by logit, highest first, then by id, lowest first.
inline uint64_t rank_of(float logit, int32_t id) { return (uint64_t)~order_key(logit) << 32 | (uint32_t)id; }
inline int32_t id_of(uint64_t rank) { return (int32_t)(uint32_t)rank; }

// Sort `ranks`, whose ids ascend, using `spare` of the same size; returns whichever of the two holds the result.
inline uint64_t* sort_ranks(uint64_t* ranks, uint64_t* spare, int n) {
  if (n <= 32) {
    for (int i = 1; i < n; i++) {
      uint64_t rank = ranks[i];
      int j = i;
      for (; j > 0 && ranks[j - 1] > rank; j--) ranks[j] = ranks[j - 1];
      ranks[j] = rank;
    }
    return ranks;
  }
  int32_t counts[4][256] = {};  // of each byte of the logits' part; ids are in order already, and this sort is stable
  for (int i = 0; i < n; i++)
    for (int digit = 0; digit < 4; digit++) counts[digit][ranks[i] >> (32 + 8 * digit) & 255]++;
  for (int digit = 0; digit < 4; digit++) {
    int shift = 32 + 8 * digit;
    if (counts[digit][ranks[0] >> shift & 255] == n) continue;  // all the same
    int32_t start = 0;
    for (int value = 0; value < 256; value++) {
      int32_t count = counts[digit][value];
      counts[digit][value] = start;
      start += count;
    }
    for (int i = 0; i < n; i++) spare[counts[digit][ranks[i] >> shift & 255]++] = ranks[i];
    uint64_t* swap = ranks;
    ranks = spare;
    spare = swap;
  }
  return ranks;
}

}  // namespace headrace::HR_ISA
