// The matrix product over weights that are not quantised: one panel of 16 outputs times rows of float32. Called by
// linear.h. For an output f, from f = 0: f = fma(weight[k], x[k], f) in the order of k, whatever the number of rows.
#pragma once

#include <utility>

#include "kernel_table.h"
#include "simd.h"

namespace headrace::HR_ISA {

#if defined(HR_ISA_AVX512)
constexpr int kMaxDenseRows = 8;
#elif defined(HR_ISA_AVX2)
constexpr int kMaxDenseRows = 6;  // 12 of 16 registers
#else
constexpr int kMaxDenseRows = 4;
#endif

struct DenseTileArgs {
  const uint8_t* weights;  // [cols][16]
  const float* x;          // rows of cols
  int64_t x_stride;
  int32_t cols;
  float* sums;  // [rows][16]
};

template <WeightKind kKind>
inline F32x16 load_weights(const uint8_t* weights, int64_t k) {
  if (kKind == WeightKind::kF32) return load((const float*)weights + kLanes * k);
  if (kKind == WeightKind::kF16) return load_f16((const uint16_t*)weights + kLanes * k);
  return load_bf16((const uint16_t*)weights + kLanes * k);
}

template <WeightKind kKind, int kRows>
void multiply_dense_tile(const DenseTileArgs& t) {
  F32x16 f[kRows];
  for (int c = 0; c < kRows; c++) f[c] = broadcast(0.0f);
  for (int64_t k = 0; k < t.cols; k++) {
    const F32x16 w = load_weights<kKind>(t.weights, k);
    for (int c = 0; c < kRows; c++) f[c] = fma(w, broadcast(t.x[c * t.x_stride + k]), f[c]);
  }
  for (int c = 0; c < kRows; c++) store(t.sums + kLanes * c, f[c]);
}

using DenseTile = void (*)(const DenseTileArgs&);

template <WeightKind kKind, int... kIndex>
DenseTile dense_tile_of(int rows, std::integer_sequence<int, kIndex...>) {
  static constexpr DenseTile kTiles[] = {multiply_dense_tile<kKind, kIndex + 1>...};
  return kTiles[rows - 1];
}

inline DenseTile choose_dense_tile(WeightKind kind, int rows) {
  constexpr auto kRows = std::make_integer_sequence<int, kMaxDenseRows>();
  if (kind == WeightKind::kF32) return dense_tile_of<WeightKind::kF32>(rows, kRows);
  if (kind == WeightKind::kF16) return dense_tile_of<WeightKind::kF16>(rows, kRows);
  return dense_tile_of<WeightKind::kBf16>(rows, kRows);
}

// sums[t][16] = panel x the rows at x.
inline void multiply_dense_panel(const PackedMatrix& m, int64_t panel, const float* x, int64_t x_stride, int num_rows,
                                 float* sums) {
  for (int row = 0; row < num_rows;) {
    const int rows = num_rows - row < kMaxDenseRows ? num_rows - row : kMaxDenseRows;
    const DenseTileArgs t = {m.data + panel * m.panel_bytes, x + row * x_stride, x_stride, m.cols, sums + kLanes * row};
    choose_dense_tile(m.kind, rows)(t);
    row += rows;
  }
}

}  // namespace headrace::HR_ISA
