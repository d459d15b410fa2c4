// exp, tanh, SiLU and GELU on sixteen lanes: one order of operations, so the same bits on every instruction set.
// Included by the kernels inside an isa_*.cpp; tests/kernels/native/test_vector_math.py holds the bounds against
// float64.
//
// Over the whole float32 range; NaN stays NaN. Largest error, in units in the last place of the float32 result:
//   exp   1    (results below 2^-126 are subnormal numbers, within 1 of their spacing; -inf gives 0, above 88.73 inf)
//   tanh  2.5  (-inf gives -1, inf 1, -0 stays -0)
//   silu  2.5  (below -88.7 the result is -0; the true value is then under 3e-37)
//   gelu_tanh  2e-7 (1 + |x|^3) of the result, as its exponent is a cubic (below -10.05 it is -0, truly under 1e-36)
#pragma once

#include "simd.h"

namespace headrace::HR_ISA {

constexpr float kLog2E = 1.44269502f;
constexpr float kLn2High = 0.693145752f;  // 15 bits: n * kLn2High is exact for |n| < 512
constexpr float kLn2Low = 1.42860677e-6f;

// x = n ln 2 + r with n integral and |r| <= ln 2 / 2.
struct ReducedExponent {
  F32x16 n, r;
};
inline ReducedExponent reduce_exponent(F32x16 x) {
  const F32x16 n = round_even(mul(x, broadcast(kLog2E)));
  const F32x16 r = fnma(n, broadcast(kLn2High), x);
  return {n, fnma(n, broadcast(kLn2Low), r)};
}

// e^r - 1 for |r| <= ln 2 / 2: r + r^2 P(r). P is a minimax fit to (e^r - 1 - r) / r^2 weighted by r^2 / e^r; the
// relative error of e^r is 3.1e-9, a twentieth of a unit in the last place.
inline F32x16 expm1_reduced(F32x16 r) {
  F32x16 p = fma(broadcast(1.38144265e-3f), r, broadcast(8.36877432e-3f));
  p = fma(p, r, broadcast(4.16683927e-2f));
  p = fma(p, r, broadcast(1.66665196e-1f));
  p = fma(p, r, broadcast(4.99999940e-1f));
  return fma(mul(r, r), p, r);
}

inline F32x16 exp(F32x16 x) {
  // Beyond these the result is 0 or infinity all the same. With x second, NaN passes both.
  x = min(broadcast(89.0f), max(broadcast(-104.0f), x));
  const ReducedExponent reduced = reduce_exponent(x);
  const F32x16 p = add(expm1_reduced(reduced.r), broadcast(1.0f));
  // 2^n in two steps, as n reaches from -150 to 128. The first product is exact.
  const F32x16 half = round_even(mul(reduced.n, broadcast(0.5f)));
  return mul(mul(p, exp2_int(half)), exp2_int(sub(reduced.n, half)));
}

// exp for x <= 0 where tiny results do not matter, as in the weights of a softmax: below -87.7 it gives 0. NaN stays
// NaN.
inline F32x16 exp_weight(F32x16 x) {
  const F32x16 clamped = max(broadcast(-88.0f), x);  // n >= -127: 2^-127 comes out as 0
  const ReducedExponent reduced = reduce_exponent(clamped);
  const F32x16 p = add(expm1_reduced(reduced.r), broadcast(1.0f));
  return mul(p, exp2_int(reduced.n));
}

inline F32x16 tanh(F32x16 x) {
  // t = e^(2|x|) - 1 without cancellation, tanh |x| = t / (t + 2); from 10 on it is 1.
  const F32x16 y = min(broadcast(20.0f), mul(abs(x), broadcast(2.0f)));
  const ReducedExponent reduced = reduce_exponent(y);
  const F32x16 power = exp2_int(reduced.n);
  const F32x16 t = fma(power, expm1_reduced(reduced.r), sub(power, broadcast(1.0f)));
  return copysign(div(t, add(t, broadcast(2.0f))), x);
}

inline F32x16 silu(F32x16 x) {  // x / (1 + e^-x)
  return div(x, add(exp(sub(broadcast(0.0f), x)), broadcast(1.0f)));
}

// x / 2 (1 + tanh u) with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2 u)): no cancellation.
inline F32x16 gelu_tanh(F32x16 x) {
  const F32x16 cubic = fma(mul(x, x), broadcast(-1.59576912f * 0.044715f), broadcast(-1.59576912f));
  return div(x, add(exp(mul(x, cubic)), broadcast(1.0f)));
}

}  // namespace headrace::HR_ISA
