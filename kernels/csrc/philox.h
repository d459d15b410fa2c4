// Counter-based random numbers, Philox4x32-10, for 64 tokens at a time: the C++ twin of headrace/kernels/philox.py.
// Included by sample_draw.h. Integers alone, so every instruction set gives the same bits by itself.
//
// Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11), table 2 and section 4.3. The key is
// the seed; the counter is (token id / 4, position, 0, 0), and word token id % 4 belongs to the token.
#pragma once

#include <cstdint>

#if defined(HR_ISA_AVX512) || defined(HR_ISA_AVX2)
#include <immintrin.h>
#endif

namespace headrace::HR_ISA {

constexpr int kPhiloxRounds = 10;
constexpr int kPhiloxTokens = 64;  // tokens of one call of philox_words
constexpr uint64_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;

struct PhiloxKeys {  // of every round; only the low halves count
  uint64_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

inline PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; round++) {
    keys.k0[round] = k0;
    keys.k1[round] = k1;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return keys;
}

// A few 32-bit words, each in the low half of 64 bits; what is in the high halves does not matter. Lane i holds block
// kPhiloxOrder[i], chosen so that store_philox needs no permutation.
#if defined(HR_ISA_AVX512)
struct PhiloxLanes {
  __m512i v;
};
constexpr int kPhiloxLanes = 8;
inline PhiloxLanes philox_blocks(uint32_t first) {
  return {_mm512_add_epi64(_mm512_set1_epi64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7))};
}
inline PhiloxLanes philox_all(uint64_t x) { return {_mm512_set1_epi64((long long)x)}; }
inline PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
inline PhiloxLanes high(PhiloxLanes a) { return {_mm512_srli_epi64(a.v, 32)}; }
inline PhiloxLanes xor3(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)};
}
inline void store_philox(uint32_t* words, PhiloxLanes c0, PhiloxLanes c1, PhiloxLanes c2, PhiloxLanes c3) {
  __m512i w01 = _mm512_mask_blend_epi32(0xAAAA, c0.v, _mm512_slli_epi64(c1.v, 32));
  __m512i w23 = _mm512_mask_blend_epi32(0xAAAA, c2.v, _mm512_slli_epi64(c3.v, 32));
  _mm512_storeu_si512(words, _mm512_unpacklo_epi64(w01, w23));
  _mm512_storeu_si512(words + 16, _mm512_unpackhi_epi64(w01, w23));
}
#elif defined(HR_ISA_AVX2)
struct PhiloxLanes {
  __m256i v;
};
constexpr int kPhiloxLanes = 4;
inline PhiloxLanes philox_blocks(uint32_t first) {
  return {_mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_setr_epi64x(0, 2, 1, 3))};
}
inline PhiloxLanes philox_all(uint64_t x) { return {_mm256_set1_epi64x((long long)x)}; }
inline PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
inline PhiloxLanes high(PhiloxLanes a) { return {_mm256_srli_epi64(a.v, 32)}; }
inline PhiloxLanes xor3(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)};
}
inline void store_philox(uint32_t* words, PhiloxLanes c0, PhiloxLanes c1, PhiloxLanes c2, PhiloxLanes c3) {
  __m256i w01 = _mm256_blend_epi32(c0.v, _mm256_slli_epi64(c1.v, 32), 0xAA);
  __m256i w23 = _mm256_blend_epi32(c2.v, _mm256_slli_epi64(c3.v, 32), 0xAA);
  _mm256_storeu_si256((__m256i*)words, _mm256_unpacklo_epi64(w01, w23));
  _mm256_storeu_si256((__m256i*)(words + 8), _mm256_unpackhi_epi64(w01, w23));
}
#else
constexpr int kPhiloxLanes = 4;
struct PhiloxLanes {
  uint64_t v[kPhiloxLanes];
};
template <typename F>
inline PhiloxLanes each_philox_lane(F f) {
  PhiloxLanes r;
  for (int i = 0; i < kPhiloxLanes; i++) r.v[i] = f(i);
  return r;
}
inline PhiloxLanes philox_blocks(uint32_t first) {
  return each_philox_lane([&](int i) { return (uint64_t)first + (uint64_t)i; });
}
inline PhiloxLanes philox_all(uint64_t x) {
  return each_philox_lane([&](int) { return x; });
}
inline PhiloxLanes product(PhiloxLanes a, PhiloxLanes b) {
  return each_philox_lane([&](int i) { return (a.v[i] & 0xFFFFFFFFu) * (b.v[i] & 0xFFFFFFFFu); });
}
inline PhiloxLanes high(PhiloxLanes a) {
  return each_philox_lane([&](int i) { return a.v[i] >> 32; });
}
inline PhiloxLanes xor3(PhiloxLanes a, PhiloxLanes b, PhiloxLanes c) {
  return each_philox_lane([&](int i) { return a.v[i] ^ b.v[i] ^ c.v[i]; });
}
inline void store_philox(uint32_t* words, PhiloxLanes c0, PhiloxLanes c1, PhiloxLanes c2, PhiloxLanes c3) {
  for (int i = 0; i < kPhiloxLanes; i++) {
    words[4 * i] = (uint32_t)c0.v[i];
    words[4 * i + 1] = (uint32_t)c1.v[i];
    words[4 * i + 2] = (uint32_t)c2.v[i];
    words[4 * i + 3] = (uint32_t)c3.v[i];
  }
}
#endif

// Two sets of blocks side by side: a round waits for its multiplication, so one alone would leave the units idle.
inline void philox_pair(uint32_t first_block, uint32_t position, const PhiloxKeys& keys, uint32_t* words) {
  const PhiloxLanes m0 = philox_all(kPhiloxM0), m1 = philox_all(kPhiloxM1);
  PhiloxLanes c0[2], c1[2], c2[2], c3[2];
  for (int i = 0; i < 2; i++) {
    c0[i] = philox_blocks(first_block + (uint32_t)(i * kPhiloxLanes));
    c1[i] = philox_all(position);
    c2[i] = c3[i] = philox_all(0);
  }
  for (int round = 0; round < kPhiloxRounds; round++) {
    const PhiloxLanes k0 = philox_all(keys.k0[round]), k1 = philox_all(keys.k1[round]);
    for (int i = 0; i < 2; i++) {
      PhiloxLanes p0 = product(c0[i], m0), p1 = product(c2[i], m1);
      c0[i] = xor3(high(p1), c1[i], k0);
      c2[i] = xor3(high(p0), c3[i], k1);
      c1[i] = p1;
      c3[i] = p0;
    }
  }
  for (int i = 0; i < 2; i++) store_philox(words + 4 * i * kPhiloxLanes, c0[i], c1[i], c2[i], c3[i]);
}

// The words of tokens 4 first_block .. 4 first_block + 63, in order.
inline void philox_words(uint32_t first_block, uint32_t position, const PhiloxKeys& keys, uint32_t* words) {
  for (int i = 0; i < kPhiloxTokens / 4; i += 2 * kPhiloxLanes)
    philox_pair(first_block + (uint32_t)i, position, keys, words + 4 * i);
}

// The word of one token.
inline uint32_t philox_word(uint32_t token_id, uint32_t position, const PhiloxKeys& keys) {
  uint32_t c[4] = {token_id / 4, position, 0, 0};
  for (int round = 0; round < kPhiloxRounds; round++) {
    uint64_t p0 = c[0] * kPhiloxM0, p1 = c[2] * kPhiloxM1;
    c[0] = (uint32_t)(p1 >> 32) ^ c[1] ^ (uint32_t)keys.k0[round];
    c[2] = (uint32_t)(p0 >> 32) ^ c[3] ^ (uint32_t)keys.k1[round];
    c[1] = (uint32_t)p1;
    c[3] = (uint32_t)p0;
  }
  return c[token_id % 4];
}

}  // namespace headrace::HR_ISA
