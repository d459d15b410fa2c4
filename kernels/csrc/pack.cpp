// See pack.h.
#define HR_ISA packing
#define HR_ISA_GENERIC 1
#include "pack.h"

#include <cstring>

#include "pack_super.h"
#include "simd.h"  // for the conversions of float16 alone

namespace headrace {
namespace {

// The logical row in lane `lane` of a panel, or -1 where it pads.
int64_t row_of(const PackedMatrix& m, int64_t panel, int lane) {
  if (!m.is_gated) {
    const int64_t row = kLanes * panel + lane;
    return row < m.rows ? row : -1;
  }
  const int64_t half = m.rows / 2, row = panel / 4 * 32 + panel % 2 * kLanes + lane;
  if (row >= half) return -1;
  return panel % 4 < 2 ? row : half + row;
}

// Where feature k of a block lies: its byte, and for int4 whether in the high nibble.
int byte_of(WeightKind kind, int lane, int k) {
  return kind == WeightKind::kInt4 ? 64 * (k % 16 / 4) + 4 * lane + k % 4 : 64 * (k / 4) + 4 * lane + k % 4;
}

void write_number(const PackedMatrix& m, uint8_t* block, int index, float value) {
  uint8_t* at = block + quant_bytes(m.kind);
  if (m.scale_kind == ScaleKind::kF16) {
    const uint16_t half = packing::narrow_f16(value);
    std::memcpy(at + 2 * index, &half, 2);
  } else {
    std::memcpy(at + 4 * index, &value, 4);
  }
}

float read_number(const PackedMatrix& m, const uint8_t* block, int index) {
  const uint8_t* at = block + quant_bytes(m.kind);
  if (m.scale_kind == ScaleKind::kF16) {
    uint16_t half;
    std::memcpy(&half, at + 2 * index, 2);
    return packing::widen_f16(half);
  }
  float value;
  std::memcpy(&value, at + 4 * index, 4);
  return value;
}

void pack_row(const PackedMatrix& m, const MatrixPart& part, int64_t row, int lane, uint8_t* panel) {
  const int64_t groups = m.cols / part.group_size, stride = block_bytes(m);
  for (int64_t b = 0; b < m.cols / kGroup; b++) {
    uint8_t* block = panel + b * stride;
    if (m.kind == WeightKind::kInt4) {
      const uint8_t* from = (const uint8_t*)part.packed + (row * m.cols + kGroup * b) / 2;
      for (int k = 0; k < 16; k++) {
        const int shift = k % 2 * 4;
        const uint8_t low = from[k / 2] >> shift & 15, high = from[8 + k / 2] >> shift & 15;
        block[byte_of(m.kind, lane, k)] = (uint8_t)(low | high << 4);
      }
    } else {
      const int8_t* from = (const int8_t*)part.packed + row * m.cols + kGroup * b;
      for (int k = 0; k < kGroup; k++) block[byte_of(m.kind, lane, k)] = (uint8_t)(from[k] + 128);
    }
    for (int i = 0; i < m.scales_per_block; i++) {
      const int64_t group = row * groups + (kGroup * b + 16 * i) / part.group_size;
      const float scale = part.scales[group];
      write_number(m, block, kLanes * i + lane, scale);
      if (!m.has_zeros) continue;
      const float implied = m.kind == WeightKind::kInt4 ? -8.0f * scale : 0.0f;
      write_number(m, block, kLanes * (m.scales_per_block + i) + lane, part.zeros ? part.zeros[group] : implied);
    }
  }
}

void pack_dense_row(const PackedMatrix& m, const MatrixPart& part, int64_t row, int lane, uint8_t* panel) {
  const size_t size = m.kind == WeightKind::kF32 ? 4 : 2;
  const uint8_t* from = (const uint8_t*)part.packed + (size_t)row * (size_t)m.cols * size;
  for (size_t k = 0; k < (size_t)m.cols; k++)
    std::memcpy(panel + (kLanes * k + (size_t)lane) * size, from + k * size, size);
}

// A row that pads: weights of zero, whatever is multiplied with them.
void pack_nothing(const PackedMatrix& m, int lane, uint8_t* panel) {
  if (!is_quantized(m.kind)) {
    const size_t size = m.kind == WeightKind::kF32 ? 4 : 2;
    for (size_t k = 0; k < (size_t)m.cols; k++) std::memset(panel + (kLanes * k + (size_t)lane) * size, 0, size);
    return;
  }
  if (is_super(m.kind)) return pack_super_padding(m, lane, panel);
  const int features = m.kind == WeightKind::kInt4 ? 16 : kGroup;
  for (int64_t b = 0; b < m.cols / kGroup; b++) {
    uint8_t* block = panel + b * block_bytes(m);
    for (int k = 0; k < features; k++) block[byte_of(m.kind, lane, k)] = m.kind == WeightKind::kInt4 ? 0 : 128;
    for (int i = 0; i < m.scales_per_block * (m.has_zeros ? 2 : 1); i++)
      write_number(m, block, kLanes * i + lane, 0.0f);
  }
}

}  // namespace

void pack_panels(const PackedMatrix& m, const MatrixPart* parts, int num_parts, uint8_t* out, int64_t begin,
                 int64_t end) {
  for (int64_t panel = begin; panel < end; panel++) {
    for (int lane = 0; lane < kLanes; lane++) {
      uint8_t* to = out + panel * m.panel_bytes;
      int64_t row = row_of(m, panel, lane);
      if (row < 0) {
        pack_nothing(m, lane, to);
        continue;
      }
      int part = 0;
      while (part + 1 < num_parts && row >= parts[part].rows) row -= parts[part++].rows;
      if (is_super(m.kind)) {
        pack_super_row(m, parts[part], row, lane, to);
      } else if (is_quantized(m.kind)) {
        pack_row(m, parts[part], row, lane, to);
      } else {
        pack_dense_row(m, parts[part], row, lane, to);
      }
    }
  }
}

namespace {

void unpack_row(const PackedMatrix& m, const uint8_t* panel, int lane, int64_t row, uint8_t* packed, float* scales,
                float* zeros) {
  const int64_t groups = (int64_t)m.cols / kGroup * m.scales_per_block;
  for (int64_t b = 0; b < m.cols / kGroup; b++) {
    const uint8_t* block = panel + b * block_bytes(m);
    for (int k = 0; k < kGroup; k++) {
      const uint8_t byte = block[byte_of(m.kind, lane, k)];
      const int64_t at = row * m.cols + kGroup * b + k;
      if (m.kind == WeightKind::kInt8) {
        packed[at] = (uint8_t)(byte - 128);
      } else {
        const uint8_t q = k < 16 ? byte & 15 : byte >> 4;
        packed[at / 2] = k % 2 ? (uint8_t)(packed[at / 2] | q << 4) : q;
      }
    }
    for (int i = 0; i < m.scales_per_block; i++) {
      const int64_t group = row * groups + b * m.scales_per_block + i;
      scales[group] = read_number(m, block, kLanes * i + lane);
      if (m.has_zeros) zeros[group] = read_number(m, block, kLanes * (m.scales_per_block + i) + lane);
    }
  }
}

}  // namespace

void unpack_matrix(const PackedMatrix& m, const UnpackedMatrix& out) {
  for (int64_t panel = 0; panel < num_panels(m); panel++) {
    const uint8_t* from = m.data + panel * m.panel_bytes;
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t row = row_of(m, panel, lane);
      if (row < 0) continue;
      if (is_super(m.kind)) {
        unpack_super_row(m, from, lane, row, out);
        continue;
      }
      if (is_quantized(m.kind)) {
        unpack_row(m, from, lane, row, (uint8_t*)out.packed, out.scales, out.zeros);
        continue;
      }
      const size_t size = m.kind == WeightKind::kF32 ? 4 : 2;
      uint8_t* to = (uint8_t*)out.packed + (size_t)row * (size_t)m.cols * size;
      for (size_t k = 0; k < (size_t)m.cols; k++)
        std::memcpy(to + k * size, from + (kLanes * k + (size_t)lane) * size, size);
    }
  }
}

}  // namespace headrace
