// What works on rows, element by element: norms, sums, gates and the soft cap. Part of every isa_*.cpp.
//
// Widths need not be multiples of 16: the last vector of a row is loaded and stored under a mask.
#pragma once

#include "activations.h"
#include "kernel_table.h"
#include "simd.h"
#include "vector_math.h"

namespace headrace::HR_ISA {

inline Mask16 first_lanes(int n) { return n >= kLanes ? (Mask16)0xFFFF : (Mask16)((1u << n) - 1); }

// 1 / sqrt(mean(x^2) + eps). Squares are summed in four accumulators of 16 lanes, vector i in accumulator i mod 4.
inline float inverse_rms(const float* x, int n, float eps) {
  F32x16 squares[4];
  for (F32x16& s : squares) s = broadcast(0.0f);
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int j = 0; j < 4; j++) {
      const F32x16 v = load(x + i + j * kLanes);
      squares[j] = fma(v, v, squares[j]);
    }
  }
  for (int j = 0; i < n; i += kLanes, j++) {
    const F32x16 v = load(x + i, first_lanes(n - i));
    squares[j] = fma(v, v, squares[j]);
  }
  const float total = sum(add(add(squares[0], squares[2]), add(squares[1], squares[3])));
  return 1.0f / __builtin_sqrtf(total / (float)n + eps);
}

// out = x * inverse_rms(x) * weight over n elements. out may be x.
inline void norm_group(const float* x, const float* weight, float eps, int n, float* out) {
  const F32x16 inverse = broadcast(inverse_rms(x, n, eps));
  for (int i = 0; i < n; i += kLanes) {
    const Mask16 m = first_lanes(n - i);
    store(out + i, mul(mul(load(x + i, m), inverse), load(weight + i, m)), m);
  }
}

// The same, quantised 32 features at a time; n is a multiple of 32.
inline void norm_quantized(const float* x, const float* weight, float eps, int n, const Activations& to, int row) {
  alignas(kAlign) float group[kGroup];
  const F32x16 inverse = broadcast(inverse_rms(x, n, eps));
  for (int i = 0; i < n; i += kGroup) {
    for (int j = 0; j < kGroup; j += kLanes) {
      store(group + j, mul(mul(load(x + i + j), inverse), load(weight + i + j)));
    }
    quantize_group(group, to, row, i / kGroup);
  }
}

// Quantised output needs group == width.
inline void rms_norm(const RmsNormArgs& args, int begin, int end) {
  for (int row = begin; row < end; row++) {
    const float* x = args.x + (args.row_index ? args.row_index[row] : row) * args.x_stride;
    if (args.out) {
      float* out = args.out + row * args.out_stride;
      for (int i = 0; i < args.width; i += args.group) norm_group(x + i, args.weight, args.eps, args.group, out + i);
      if (args.quantized) quantize_row(out, *args.quantized, row);
    } else {
      norm_quantized(x, args.weight, args.eps, args.width, *args.quantized, row);
    }
  }
}

// out = f(a, b) for rows [begin, end). Without b, f sees zeros.
template <typename F>
inline void each_element(const ElementwiseArgs& args, int begin, int end, F f) {
  for (int row = begin; row < end; row++) {
    const float* a = args.a + row * args.a_stride;
    const float* b = args.b ? args.b + row * args.b_stride : nullptr;
    float* out = args.out + row * args.out_stride;
    for (int i = 0; i < args.width; i += kLanes) {
      const Mask16 m = first_lanes(args.width - i);
      store(out + i, f(load(a + i, m), b ? load(b + i, m) : broadcast(0.0f)), m);
    }
  }
}

inline void add_rows(const ElementwiseArgs& args, int begin, int end) {
  each_element(args, begin, end, [](F32x16 a, F32x16 b) { return add(a, b); });
}
inline void silu_gate(const ElementwiseArgs& args, int begin, int end) {
  each_element(args, begin, end, [](F32x16 a, F32x16 b) { return mul(silu(a), b); });
}
inline void gelu_gate(const ElementwiseArgs& args, int begin, int end) {
  each_element(args, begin, end, [](F32x16 a, F32x16 b) { return mul(gelu_tanh(a), b); });
}
inline void soft_cap(const ElementwiseArgs& args, int begin, int end) {
  const F32x16 cap = broadcast(args.cap);
  each_element(args, begin, end, [cap](F32x16 a, F32x16) { return mul(cap, tanh(div(a, cap))); });
}

}  // namespace headrace::HR_ISA
