// F32x16 as an array: the meaning of every operation, and the oracle of the other instruction sets. See simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace headrace::HR_ISA {

struct F32x16 {
  float v[16];
};

using Mask16 = uint16_t;  // bit i: lane i

template <typename F>
inline F32x16 each_lane(F f) {
  F32x16 r;
  for (int i = 0; i < 16; i++) r.v[i] = f(i);
  return r;
}
inline uint32_t bits_of(float x) {
  uint32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
inline float float_of(uint32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

inline F32x16 load(const float* p) {
  return each_lane([&](int i) { return p[i]; });
}
inline F32x16 load(const float* p, Mask16 m) {  // other lanes 0
  return each_lane([&](int i) { return m >> i & 1 ? p[i] : 0.0f; });
}
inline void store(float* p, F32x16 a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store(float* p, F32x16 a, Mask16 m) {
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) p[i] = a.v[i];
}
inline F32x16 broadcast(float x) {
  return each_lane([&](int) { return x; });
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return each_lane([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each_lane([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each_lane([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each_lane([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {  // a b + c
  return each_lane([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) {  // c - a b
  return each_lane([&](int i) { return std::fma(-a.v[i], b.v[i], c.v[i]); });
}
inline F32x16 max(F32x16 a, F32x16 b) {  // b where a is NaN
  return each_lane([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each_lane([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 abs(F32x16 a) {
  return each_lane([&](int i) { return std::fabs(a.v[i]); });
}
inline F32x16 copysign(F32x16 magnitude, F32x16 sign) {
  return each_lane([&](int i) { return std::copysign(magnitude.v[i], sign.v[i]); });
}
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) {  // m ? a : b
  return each_lane([&](int i) { return m >> i & 1 ? a.v[i] : b.v[i]; });
}
inline F32x16 round_even(F32x16 a) {
  return each_lane([&](int i) { return std::nearbyint(a.v[i]); });
}
// 2^n for integral n in [-126, 127]; -127 gives 0, NaN gives 1.
inline F32x16 exp2_int(F32x16 n) {
  return each_lane([&](int i) {
    const int32_t exponent = n.v[i] == n.v[i] ? (int32_t)n.v[i] : 0;
    return float_of((uint32_t)(exponent + 127) << 23);
  });
}

inline float widen_f16(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
  if (exponent == 31) return float_of(sign | 0x7F800000 | fraction << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | fraction << 13);
  float magnitude = (float)fraction * 5.9604644775390625e-8f;  // 2^-24: subnormal
  return sign ? -magnitude : magnitude;
}
inline uint16_t narrow_f16(float x) {  // nearest even; beyond 65504 infinity, as the hardware does
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return (uint16_t)(sign | 0x7E00 | (magnitude >> 13 & 0x3FF));
  if (magnitude >= 0x477FF000) return (uint16_t)(sign | 0x7C00);
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    return (uint16_t)(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000));
  }
  uint32_t odd = magnitude >> 13 & 1;
  return (uint16_t)(sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13));
}
inline F32x16 load_f16(const uint16_t* p) {
  return each_lane([&](int i) { return widen_f16(p[i]); });
}
inline void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 16; i++) p[i] = narrow_f16(a.v[i]);
}
inline F32x16 load_bf16(const uint16_t* p) {
  return each_lane([&](int i) { return float_of((uint32_t)p[i] << 16); });
}
inline void store_bf16(uint16_t* p, F32x16 a) {  // NaN becomes 0x7FC0
  for (int i = 0; i < 16; i++) {
    uint32_t bits = bits_of(a.v[i]);
    p[i] = a.v[i] == a.v[i] ? (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) : (uint16_t)0x7FC0;
  }
}
inline F32x16 load_i8(const int8_t* p) {
  return each_lane([&](int i) { return (float)p[i]; });
}
inline void store_i8(int8_t* p, F32x16 a) {  // integral lanes in -128..127
  for (int i = 0; i < 16; i++) p[i] = (int8_t)a.v[i];
}
inline F32x16 load_i32(const int32_t* p) {
  return each_lane([&](int i) { return (float)p[i]; });
}
inline void store_i32(int32_t* p, F32x16 a) {  // nearest even
  for (int i = 0; i < 16; i++) p[i] = (int32_t)std::nearbyint(a.v[i]);
}

inline float sum(F32x16 a) {
  for (int n = 8; n >= 1; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
  return a.v[0];
}
inline float max_lane(F32x16 a) {
  for (int n = 8; n >= 1; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
  return a.v[0];
}

}  // namespace headrace::HR_ISA
