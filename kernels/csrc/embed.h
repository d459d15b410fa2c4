// Token embeddings: rows of a packed table of any kind, dequantised. The executor calls `embed` through the kernel
// table.
#pragma once

#include "kernel_table.h"
#include "simd.h"

namespace headrace::HR_ISA {

// Feature k of row `lane` of a dense panel.
inline float dense_weight(const PackedMatrix& m, const uint8_t* panel, int lane, int64_t k) {
  const int64_t at = kLanes * k + lane;
  if (m.kind == WeightKind::kF32) return ((const float*)panel)[at];
  // Sixteen are widened for one: only the lanes' load knows float16 on every instruction set.
  alignas(64) float lanes[kLanes];
  const uint16_t* row = (const uint16_t*)panel + kLanes * k;
  store(lanes, m.kind == WeightKind::kF16 ? load_f16(row) : load_bf16(row));
  return lanes[lane];
}

// scale * q rounded, then + zero rounded: the arithmetic of QuantTensor.dequantize().
inline void dequantize_block(const PackedMatrix& m, const uint8_t* block, int lane, float scale, float* out) {
  const bool is_int4 = m.kind == WeightKind::kInt4;
  const int vectors = m.scales_per_block * (m.has_zeros ? 2 : 1);
  const int offset = !is_int4 ? 128 : m.has_zeros ? 0 : 8;
  float numbers[4];  // scales, then zeros, of this row
  for (int v = 0; v < vectors; v++) {
    alignas(64) float lanes[kLanes];
    const uint8_t* at = block + quant_bytes(m.kind);
    store(lanes, m.scale_kind == ScaleKind::kF16 ? load_f16((const uint16_t*)at + kLanes * v)
                                                 : load((const float*)at + kLanes * v));
    numbers[v] = lanes[lane];
  }
  for (int k = 0; k < kGroup; k++) {
    const int part = m.scales_per_block == 2 ? k / 16 : 0;
    int q;
    if (is_int4) {
      q = block[64 * (k % 16 / 4) + 4 * lane + k % 4] >> (k < 16 ? 0 : 4) & 15;
    } else {
      q = block[64 * (k / 4) + 4 * lane + k % 4];
    }
    float value = numbers[part] * (float)(q - offset);
    if (m.has_zeros) value = value + numbers[m.scales_per_block + part];
    out[k] = value * scale;
  }
}

// The same of a row of a super-block: d * scale and dmin * min are exact.
inline void dequantize_super(const PackedMatrix& m, const uint8_t* super, int lane, float scale, float* out) {
  alignas(64) float d[kLanes], dmin[kLanes];
  store(d, load_f16((const uint16_t*)super));
  store(dmin, load_f16((const uint16_t*)(super + 32)));
  const bool is_signed = m.kind == WeightKind::kSuper6;
  const int part_size = kSuper / super_parts(m.kind);
  for (int k = 0; k < kSuper; k++) {
    const uint8_t* block = super + kSuperBlocks + k / kGroup * super_block_bytes(m.kind);
    const int q = super_weight(m.kind, block, lane, k % kGroup);
    const int at = kLanes * (k / part_size) + lane;
    if (is_signed) {
      out[k] = d[lane] * (float)(int8_t)super[kSuperScales + at] * (float)(q - 32) * scale;
    } else {
      const float value = d[lane] * (float)super[kSuperScales + at] * (float)q;
      out[k] = (value - dmin[lane] * (float)super[kSuperMins + at]) * scale;
    }
  }
}

inline void embed(const EmbedArgs& args, int begin, int end) {
  const PackedMatrix& m = *args.table;
  for (int row = begin; row < end; row++) {
    const int32_t id = args.token_ids[row];
    const uint8_t* panel = m.data + id / kLanes * m.panel_bytes;
    float* out = args.out + row * args.out_stride;
    if (is_super(m.kind)) {
      for (int64_t s = 0; s < m.cols / kSuper; s++)
        dequantize_super(m, panel + s * super_bytes(m.kind), id % kLanes, args.scale, out + kSuper * s);
    } else if (is_quantized(m.kind)) {
      for (int block = 0; block < m.cols / kGroup; block++)
        dequantize_block(m, panel + block * block_bytes(m), id % kLanes, args.scale, out + kGroup * block);
    } else {
      for (int64_t k = 0; k < m.cols; k++) out[k] = dense_weight(m, panel, id % kLanes, k) * args.scale;
    }
  }
}

}  // namespace headrace::HR_ISA
