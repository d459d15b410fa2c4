// Weights from the order that loaders produce to the panels of layout.h, and back. Called once per matrix at load, by
// abi_linear.cpp.
#pragma once

#include "layout.h"

namespace headrace {

// Some rows of a matrix, row by row. The parts of a matrix lie one below the other: q, k and v; gate and up.
//   kInt4            packed: uint8 [rows][cols / 2], feature 2 i in the low nibble of byte i, q in 0..15
//   kInt8            packed: int8 [rows][cols]
//   kF32/kF16/kBf16  packed: [rows][cols]; nothing else
//   kSuper4          packed as kInt4; kSuper5 as kInt8, q in 0..31; kSuper6 as kInt8, q in -32..31
// scales, and zeros where there are: [rows][cols / group_size], group_size 16 or a multiple of 32. Without zeros int4
// means scale * (q - 8). For the kinds with super-blocks d and dmin, [rows][cols / 256], exact as float16; sub_scales
// and sub_mins [rows][cols / group_size], group_size 32, or 16 for kSuper6, which has no zeros and no sub_mins.
struct MatrixPart {
  const void* packed;
  const float* scales;
  const float* zeros;
  const uint8_t* sub_scales;  // of kSuper6 int8
  const uint8_t* sub_mins;
  int32_t rows;
  int32_t group_size;
};

// Fill panels [begin, end) of `out`, which has room for the whole matrix (m.data is not looked at). The parts' rows sum
// to m.rows. A matrix with zeros may have parts without, one with two scales per block parts with larger groups: the
// weights stay the same. Scales are rounded to nearest where m keeps them as float16.
void pack_panels(const PackedMatrix& m, const MatrixPart* parts, int num_parts, uint8_t* out, int64_t begin,
                 int64_t end);

// Where the inverse puts what MatrixPart has; null where m has none.
struct UnpackedMatrix {
  void* packed;
  float* scales;
  float* zeros;
  uint8_t* sub_scales;
  uint8_t* sub_mins;
};

// The inverse, as one part of group_size 32 / m.scales_per_block, or that of a kind with super-blocks.
void unpack_matrix(const PackedMatrix& m, const UnpackedMatrix& to);

}  // namespace headrace
