// See pack_super.h.
#define HR_ISA packing_super
#define HR_ISA_GENERIC 1
#include "pack_super.h"

#include <cstring>

#include "simd.h"  // for the conversions of float16 alone

namespace headrace {
namespace {

void write_f16(uint8_t* at, int lane, float value) {
  const uint16_t half = packing_super::narrow_f16(value);
  std::memcpy(at + 2 * lane, &half, 2);
}

float read_f16(const uint8_t* at, int lane) {
  uint16_t half;
  std::memcpy(&half, at + 2 * lane, 2);
  return packing_super::widen_f16(half);
}

// What is added to a signed q to make it 0..63; nothing for the kinds whose q are unsigned.
int offset_of(WeightKind kind) { return kind == WeightKind::kSuper6 ? 32 : 0; }

// The 32 integers of one row in a block: the inverse of super_weight.
void write_integers(WeightKind kind, const uint8_t* q, int lane, uint8_t* block) {
  for (int k = 0; k < 16; k++) {
    const int at = 64 * (k / 4) + 4 * lane + k % 4;
    if (kind == WeightKind::kSuper6) {
      if (k >= 12) continue;
      for (int p = 0; p < 2; p++)
        block[192 * p + at] = (uint8_t)(q[16 * p + k] | (q[16 * p + 12 + k % 4] >> k / 4 * 2 & 3) << 6);
    } else {
      block[at] = (uint8_t)((q[k] & 15) | (q[16 + k] & 15) << 4);
    }
  }
  if (kind != WeightKind::kSuper5) return;
  for (int j = 0; j < 4; j++) {
    int bits = 0;
    for (int g = 0; g < 8; g++) bits |= q[4 * g + j] >> 4 << g;
    block[256 + 4 * lane + j] = (uint8_t)bits;
  }
}

void write_super(WeightKind kind, const uint8_t* q, int lane, uint8_t* super) {
  for (int block = 0; block < 8; block++)
    write_integers(kind, q + kGroup * block, lane, super + kSuperBlocks + block * super_block_bytes(kind));
}

void read_super(WeightKind kind, const uint8_t* super, int lane, uint8_t* q) {
  for (int k = 0; k < kSuper; k++) {
    const uint8_t* block = super + kSuperBlocks + k / kGroup * super_block_bytes(kind);
    q[k] = (uint8_t)super_weight(kind, block, lane, k % kGroup);
  }
}

// Super-block `index` (of all rows) of a part, as unsigned integers.
void integers_of(WeightKind kind, const void* packed, int64_t index, uint8_t* q) {
  if (kind == WeightKind::kSuper4) {
    const uint8_t* from = (const uint8_t*)packed + index * kSuper / 2;
    for (int k = 0; k < kSuper; k++) q[k] = from[k / 2] >> k % 2 * 4 & 15;
  } else {
    const uint8_t* from = (const uint8_t*)packed + index * kSuper;
    for (int k = 0; k < kSuper; k++) q[k] = (uint8_t)(from[k] + offset_of(kind));
  }
}

}  // namespace

void pack_super_row(const PackedMatrix& m, const MatrixPart& part, int64_t row, int lane, uint8_t* panel) {
  const int64_t supers = m.cols / kSuper;
  const int parts = super_parts(m.kind);
  for (int64_t s = 0; s < supers; s++) {
    uint8_t* super = panel + s * super_bytes(m.kind);
    const int64_t index = row * supers + s;
    uint8_t q[kSuper];
    integers_of(m.kind, part.packed, index, q);
    write_super(m.kind, q, lane, super);
    write_f16(super, lane, part.scales[index]);
    write_f16(super + 32, lane, part.zeros ? part.zeros[index] : 0.0f);
    for (int i = 0; i < parts; i++) super[kSuperScales + kLanes * i + lane] = part.sub_scales[index * parts + i];
    if (m.kind == WeightKind::kSuper6) continue;
    for (int i = 0; i < parts; i++) super[kSuperMins + kLanes * i + lane] = part.sub_mins[index * parts + i];
  }
}

void pack_super_padding(const PackedMatrix& m, int lane, uint8_t* panel) {
  const uint8_t q[kSuper] = {};
  for (int64_t s = 0; s < m.cols / kSuper; s++) {
    uint8_t* super = panel + s * super_bytes(m.kind);
    write_super(m.kind, q, lane, super);
    write_f16(super, lane, 0.0f);
    write_f16(super + 32, lane, 0.0f);
    for (int i = kSuperScales + lane; i < kSuperBlocks; i += kLanes) super[i] = 0;
  }
}

void unpack_super_row(const PackedMatrix& m, const uint8_t* panel, int lane, int64_t row, const UnpackedMatrix& to) {
  const int64_t supers = m.cols / kSuper;
  const int parts = super_parts(m.kind);
  const bool has_mins = m.kind != WeightKind::kSuper6;
  for (int64_t s = 0; s < supers; s++) {
    const uint8_t* super = panel + s * super_bytes(m.kind);
    const int64_t index = row * supers + s;
    uint8_t q[kSuper];
    read_super(m.kind, super, lane, q);
    uint8_t* out = (uint8_t*)to.packed + index * kSuper / (m.kind == WeightKind::kSuper4 ? 2 : 1);
    for (int k = 0; k < kSuper; k++) {
      if (m.kind != WeightKind::kSuper4) {
        out[k] = (uint8_t)(q[k] - offset_of(m.kind));
      } else if (k % 2) {
        out[k / 2] = (uint8_t)(q[k - 1] | q[k] << 4);
      }
    }
    to.scales[index] = read_f16(super, lane);
    if (has_mins) to.zeros[index] = read_f16(super + 32, lane);
    for (int i = 0; i < parts; i++) {
      to.sub_scales[index * parts + i] = super[kSuperScales + kLanes * i + lane];
      if (has_mins) to.sub_mins[index * parts + i] = super[kSuperMins + kLanes * i + lane];
    }
  }
}

}  // namespace headrace
