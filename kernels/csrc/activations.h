// Activations of the integer products: float32 rows to int8 or int16 in groups of 32, four rows interleaved. Called by
// the kernels whose result only feeds a quantised weight (norms, attention, gates), by quantize(), and read by
// linear*.h.
//
// A block is 4 rows x 32 features: 64 bytes of numbers about each row's group, then the integers, so that one pointer
// serves every broadcast of a tile and a matrix product reads its activations as one stream:
//
//   f32 scale[4]          x = scale * q; NaN where a value is infinite or NaN, which poisons every product of the row
//   f32 scale_sum[4]      scale * float(sum of the 32 q), rounded once
//   i32 neg8_sum[4]       -8 * sum of the 32 q: takes the offset of unsigned weights out of an integer dot, exactly
//   i32 neg8_sum_high[4]  the same of features 16..31
//   bits 8:  i8  [g 0..7][row 0..3][4]: feature 4 g + j
//   bits 16: i16 [g 0..7][row 0..3][4]: features 4 g + {0, 2, 1, 3}, so that the even bytes of four unsigned weights
//            meet the first pair and the odd bytes the second
//
// A block of 4 rows and group k of a row block r lies at index r * (width / 32) + k.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel_table.h"
#include "simd.h"

namespace headrace::HR_ISA {

struct ActivationHeader {
  float scale[kColumns];
  float scale_sum[kColumns];
  int32_t neg8_sum[kColumns];
  int32_t neg8_sum_high[kColumns];
};
static_assert(sizeof(ActivationHeader) == 64, "one cache line before the integers");

// Groups whose largest magnitude is below 2^-110 count as zero: their scale would no longer be a normal number.
constexpr float kTiniestGroup = 7.70371977754894343e-34f;

inline uint8_t* activation_block(const Activations& to, int row, int group) {
  const size_t index = (size_t)(row / kColumns) * (size_t)(to.width / kGroup) + (size_t)group;
  return to.data + index * activation_block_bytes(to.bits);
}

// The integers of one row's group, given as floats.
inline void store_group(uint8_t* block, int32_t bits, int column, F32x16 low, F32x16 high) {
  uint8_t* data = block + sizeof(ActivationHeader);
  if (bits == 8) {
    alignas(16) int8_t q[kGroup];
    store_i8(q, low);
    store_i8(q + 16, high);
    for (int g = 0; g < 8; g++) std::memcpy(data + 16 * g + 4 * column, q + 4 * g, 4);
  } else {
    alignas(64) int32_t q[kGroup];
    store_i32(q, low);
    store_i32(q + 16, high);
    for (int g = 0; g < 8; g++) {
      const int32_t* from = q + 4 * g;
      const int16_t four[4] = {(int16_t)from[0], (int16_t)from[2], (int16_t)from[1], (int16_t)from[3]};
      std::memcpy(data + 32 * g + 8 * column, four, 8);
    }
  }
}

inline void store_header(uint8_t* block, int column, float scale, float sum, float sum_high) {
  ActivationHeader* header = (ActivationHeader*)block;
  header->scale[column] = scale;
  header->scale_sum[column] = scale * sum;
  header->neg8_sum[column] = -8 * (int32_t)sum;
  header->neg8_sum_high[column] = -8 * (int32_t)sum_high;
}

// A group that is zero, or holds a value that is not finite.
__attribute__((noinline)) inline void quantize_special(const float* x32, const Activations& to, int row, int group) {
  const F32x16 zero = broadcast(0.0f);
  const float poison = sum(add(mul(load(x32), zero), mul(load(x32 + 16), zero)));  // NaN where one value is not finite
  const uint32_t quiet_nan = 0x7FC00000;
  float scale = 0.0f;
  if (poison != poison) std::memcpy(&scale, &quiet_nan, 4);
  uint8_t* block = activation_block(to, row, group);
  store_header(block, row % kColumns, scale, 0.0f, 0.0f);
  store_group(block, to.bits, row % kColumns, zero, zero);
}

// 32 features of one row, starting at x32, to group `group` of row `row`. scale = max |x| / 127 (or 32512), q to
// nearest even. Groups are independent: threads may write different groups, and different rows, at the same time.
inline void quantize_group(const float* x32, const Activations& to, int row, int group) {
  const float most = to.bits == 8 ? 127.0f : 32512.0f;
  F32x16 low = load(x32), high = load(x32 + 16);
  const float largest = max_lane(max(abs(low), abs(high)));
  if (!(largest >= kTiniestGroup)) return quantize_special(x32, to, row, group);
  const F32x16 inverse = broadcast(most / largest);
  low = round_even(mul(low, inverse));
  high = round_even(mul(high, inverse));
  const float sum_high = sum(high), sum_all = sum(low) + sum_high;  // integers below 2^24: exact
  // NaN times anything, and infinity times most / infinity, make the sum NaN.
  if (sum_all != sum_all) return quantize_special(x32, to, row, group);
  uint8_t* block = activation_block(to, row, group);
  store_header(block, row % kColumns, largest / most, sum_all, sum_high);
  store_group(block, to.bits, row % kColumns, low, high);
}

// quantize_group of the four rows from `row` on, a multiple of 4, which lie `stride` floats apart: what waits for the
// end of one row's sums is done meanwhile for the others.
inline void quantize_group_of_four(const float* x, int64_t stride, const Activations& to, int row, int group) {
  const float most = to.bits == 8 ? 127.0f : 32512.0f;
  float largest[kColumns], sums[kColumns], sums_high[kColumns];
  F32x16 low[kColumns], high[kColumns];
  bool is_special = false;
  for (int c = 0; c < kColumns; c++) {
    largest[c] = max_lane(max(abs(load(x + c * stride)), abs(load(x + c * stride + 16))));
    is_special |= !(largest[c] >= kTiniestGroup);
  }
  for (int c = 0; c < kColumns; c++) {
    const F32x16 inverse = broadcast(most / largest[c]);
    low[c] = round_even(mul(load(x + c * stride), inverse));
    high[c] = round_even(mul(load(x + c * stride + 16), inverse));
    sums_high[c] = sum(high[c]);
    sums[c] = sum(low[c]) + sums_high[c];
    is_special |= sums[c] != sums[c];
  }
  if (is_special) {
    for (int c = 0; c < kColumns; c++) quantize_group(x + c * stride, to, row + c, group);
    return;
  }
  uint8_t* block = activation_block(to, row, group);
  for (int c = 0; c < kColumns; c++) store_header(block, c, largest[c] / most, sums[c], sums_high[c]);
  for (int c = 0; c < kColumns; c++) store_group(block, to.bits, c, low[c], high[c]);
}

// One row of to.width features.
inline void quantize_row(const float* x, const Activations& to, int row) {
  for (int group = 0; group < to.width / kGroup; group++) quantize_group(x + kGroup * group, to, row, group);
}

inline void quantize(const QuantizeArgs& args, int begin, int end) {
  for (int row = begin; row < end; row++) quantize_row(args.x + row * args.x_stride, *args.quantized, row);
}

}  // namespace headrace::HR_ISA
