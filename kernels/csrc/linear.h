// Linear layers: the matrix products of the step with what follows each of them (bias, residual, gate, quantisation).
// The executor calls `linear` through the kernel table. Products: linear_tile.h (quantised),
// linear_super.h (quantised, with scales of two levels), linear_dense.h.
#pragma once

#include "linear_dense.h"
#include "linear_super.h"
#include "linear_tile.h"
#include "vector_math.h"

namespace headrace::HR_ISA {

// Rows of x multiplied before the weights are read again: their activations (64 x 1,536 features: 147 KB as int8) stay
// in a 512 KiB second-level cache beside the weights that stream by.
constexpr int kRowsAtOnce = 64;

inline void multiply(const LinearArgs& args, int64_t panel, int first, int num_rows, float* sums) {
  const PackedMatrix& m = *args.weight;
  if (is_super(m.kind)) {
    multiply_super_panel(m, panel, *args.activations, first, num_rows, sums);
  } else if (is_quantized(m.kind)) {
    multiply_panel(m, panel, *args.activations, first, num_rows, sums);
  } else {
    multiply_dense_panel(m, panel, args.x + first * args.x_stride, args.x_stride, num_rows, sums);
  }
  if (!args.bias) return;
  const F32x16 bias = load(args.bias + kLanes * panel);
  for (int row = 0; row < num_rows; row++) store(sums + kLanes * row, add(load(sums + kLanes * row), bias));
}

// The lanes of 16 outputs from `at` on that exist.
inline Mask16 lanes_below(int64_t rows, int64_t at) {
  const int64_t left = rows - at;
  return left >= kLanes ? (Mask16)0xFFFF : left <= 0 ? (Mask16)0 : (Mask16)((1u << left) - 1);
}

inline void linear_panel(const LinearArgs& args, int64_t panel, int first, int num_rows) {
  alignas(64) float sums[kRowsAtOnce * kLanes];
  multiply(args, panel, first, num_rows, sums);
  const int64_t at = kLanes * panel;
  const Mask16 mask = lanes_below(args.weight->rows, at);
  for (int row = 0; row < num_rows; row++) {
    float* out = args.out + (first + row) * args.out_stride + at;
    F32x16 value = load(sums + kLanes * row);
    if (mask == 0xFFFF) {
      if (args.epilogue == Epilogue::kAdd) value = add(load(out), value);
      store(out, value);
    } else {
      if (args.epilogue == Epilogue::kAdd) value = add(load(out, mask), value);
      store(out, value, mask);
    }
  }
}

// Four panels: 32 rows of gate, 32 rows of up.
inline void linear_gated(const LinearArgs& args, int64_t unit, int first, int num_rows) {
  alignas(64) float sums[4][kRowsAtOnce * kLanes];
  for (int i = 0; i < 4; i++) multiply(args, 4 * unit + i, first, num_rows, sums[i]);
  const bool is_silu = args.epilogue == Epilogue::kSiluGate;
  const int64_t at = 32 * unit, width = args.weight->rows / 2;
  // In stages over all rows: a row alone is a chain of operations that wait for each other.
  alignas(64) float values[kRowsAtOnce * 32];
  for (int row = 0; row < num_rows; row++) {
    for (int half = 0; half < 2; half++) {
      const F32x16 gate = load(sums[half] + kLanes * row), up = load(sums[2 + half] + kLanes * row);
      store(values + 32 * row + kLanes * half, mul(is_silu ? silu(gate) : gelu_tanh(gate), up));
    }
  }
  int row = 0;
  for (; !args.out && row + kColumns <= num_rows; row += kColumns) {
    quantize_group_of_four(values + 32 * row, 32, *args.gated, first + row, (int)unit);
  }
  for (; !args.out && row < num_rows; row++) quantize_group(values + 32 * row, *args.gated, first + row, (int)unit);
  for (; row < num_rows; row++) {
    float* out = args.out + (first + row) * args.out_stride + at;
    store(out, load(values + 32 * row), lanes_below(width, at));
    store(out + kLanes, load(values + 32 * row + kLanes), lanes_below(width, at + kLanes));
  }
}

inline void linear(const LinearArgs& args, int begin, int end) {
  for (int first = 0; first < args.num_rows; first += kRowsAtOnce) {
    const int num_rows = args.num_rows - first < kRowsAtOnce ? args.num_rows - first : kRowsAtOnce;
    for (int unit = begin; unit < end; unit++) {
      if (args.weight->is_gated) {
        linear_gated(args, unit, first, num_rows);
      } else {
        linear_panel(args, unit, first, num_rows);
      }
    }
  }
}

}  // namespace headrace::HR_ISA
