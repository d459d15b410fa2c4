// F32x16 as four 128-bit registers of Armv8.2. See simd.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace headrace::HR_ISA {

struct F32x16 {
  float32x4_t q[4];
};

using Mask16 = uint16_t;  // bit i: lane i

template <typename F>
inline F32x16 each_quarter(F f) {
  return {{f(0), f(1), f(2), f(3)}};
}
inline uint32x4_t mask_of(unsigned bits) {  // the low 4 bits, each as a lane of all ones or zeros
  static const uint32_t kBit[4] = {1, 2, 4, 8};
  return vtstq_u32(vdupq_n_u32(bits), vld1q_u32(kBit));
}
inline float32x4_t larger(float32x4_t a, float32x4_t b) {
  return vbslq_f32(vcgtq_f32(a, b), a, b);
}  // b where a is NaN

inline F32x16 load(const float* p) {
  return each_quarter([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline F32x16 load(const float* p, Mask16 m) {  // other lanes 0, and not touched
  float lanes[16] = {};
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) lanes[i] = p[i];
  return load(lanes);
}
inline void store(float* p, F32x16 a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.q[i]);
}
inline void store(float* p, F32x16 a, Mask16 m) {
  float lanes[16];
  store(lanes, a);
  for (int i = 0; i < 16; i++)
    if (m >> i & 1) p[i] = lanes[i];
}
inline F32x16 broadcast(float x) {
  return each_quarter([&](int) { return vdupq_n_f32(x); });
}
inline F32x16 add(F32x16 a, F32x16 b) {
  return each_quarter([&](int i) { return vaddq_f32(a.q[i], b.q[i]); });
}
inline F32x16 sub(F32x16 a, F32x16 b) {
  return each_quarter([&](int i) { return vsubq_f32(a.q[i], b.q[i]); });
}
inline F32x16 mul(F32x16 a, F32x16 b) {
  return each_quarter([&](int i) { return vmulq_f32(a.q[i], b.q[i]); });
}
inline F32x16 div(F32x16 a, F32x16 b) {
  return each_quarter([&](int i) { return vdivq_f32(a.q[i], b.q[i]); });
}
inline F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {  // a b + c
  return each_quarter([&](int i) { return vfmaq_f32(c.q[i], a.q[i], b.q[i]); });
}
inline F32x16 fnma(F32x16 a, F32x16 b, F32x16 c) {  // c - a b
  return each_quarter([&](int i) { return vfmsq_f32(c.q[i], a.q[i], b.q[i]); });
}
inline F32x16 max(F32x16 a, F32x16 b) {  // b where a is NaN
  return each_quarter([&](int i) { return larger(a.q[i], b.q[i]); });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return each_quarter([&](int i) { return vbslq_f32(vcltq_f32(a.q[i], b.q[i]), a.q[i], b.q[i]); });
}
inline F32x16 abs(F32x16 a) {
  return each_quarter([&](int i) { return vabsq_f32(a.q[i]); });
}
inline F32x16 copysign(F32x16 magnitude, F32x16 sign) {
  return each_quarter([&](int i) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign.q[i], magnitude.q[i]); });
}
inline F32x16 select(Mask16 m, F32x16 a, F32x16 b) {  // m ? a : b
  return each_quarter([&](int i) { return vbslq_f32(mask_of(m >> 4 * i), a.q[i], b.q[i]); });
}
inline F32x16 round_even(F32x16 a) {
  return each_quarter([&](int i) { return vrndnq_f32(a.q[i]); });
}
// 2^n for integral n in [-126, 127]; -127 gives 0, NaN gives 1.
inline F32x16 exp2_int(F32x16 n) {
  return each_quarter([&](int i) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.q[i]), vdupq_n_s32(127)), 23));
  });
}

inline F32x16 load_f16(const uint16_t* p) {
  return each_quarter([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline void store_f16(uint16_t* p, F32x16 a) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.q[i])));
}
inline F32x16 load_bf16(const uint16_t* p) {
  return each_quarter([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline void store_bf16(uint16_t* p, F32x16 a) {  // NaN becomes 0x7FC0
  for (int i = 0; i < 4; i++) {
    const uint32x4_t bits = vreinterpretq_u32_f32(a.q[i]);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF))), 16);
    const uint32x4_t is_number = vceqq_f32(a.q[i], a.q[i]);
    vst1_u16(p + 4 * i, vmovn_u32(vbslq_u32(is_number, rounded, vdupq_n_u32(0x7FC0))));
  }
}
inline F32x16 load_i8(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
}
inline void store_i8(int8_t* p, F32x16 a) {  // integral lanes in -128..127
  int16x4_t words[4];
  for (int i = 0; i < 4; i++) words[i] = vmovn_s32(vcvtnq_s32_f32(a.q[i]));
  vst1q_s8(p, vcombine_s8(vmovn_s16(vcombine_s16(words[0], words[1])), vmovn_s16(vcombine_s16(words[2], words[3]))));
}
inline F32x16 load_i32(const int32_t* p) {
  return each_quarter([&](int i) { return vcvtq_f32_s32(vld1q_s32(p + 4 * i)); });
}
inline void store_i32(int32_t* p, F32x16 a) {  // nearest even
  for (int i = 0; i < 4; i++) vst1q_s32(p + 4 * i, vcvtnq_s32_f32(a.q[i]));
}

inline float sum(F32x16 a) {
  const float32x4_t s4 = vaddq_f32(vaddq_f32(a.q[0], a.q[2]), vaddq_f32(a.q[1], a.q[3]));
  const float32x2_t s2 = vadd_f32(vget_low_f32(s4), vget_high_f32(s4));
  return vget_lane_f32(s2, 0) + vget_lane_f32(s2, 1);
}
inline float max_lane(F32x16 a) {
  const float32x4_t s4 = larger(larger(a.q[0], a.q[2]), larger(a.q[1], a.q[3]));
  const float32x4_t s2 = larger(s4, vextq_f32(s4, s4, 2));
  const float first = vgetq_lane_f32(s2, 0), second = vgetq_lane_f32(s2, 1);
  return first > second ? first : second;
}

}  // namespace headrace::HR_ISA
