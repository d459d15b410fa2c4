// Rotary embedding of queries and keys, and the write of keys and values into the KV blocks. Part of every isa_*.cpp.
#pragma once

#include <cstring>

#include "elementwise.h"
#include "kernel_table.h"
#include "kv.h"
#include "simd.h"

namespace headrace {

// rope_table.cpp: compiled once, for no particular instruction set, so that all share one table to the bit.
void rope_table(const RopeTableArgs& args, int begin, int end);

namespace HR_ISA {

// Pairs (i, i + half) of one head (Su et al. 2021, the halves form): x1 cos - x2 sin, x2 cos + x1 sin.
inline void rotate_head(float* x, const float* cos_sin, int half) {
  for (int i = 0; i < half; i += kLanes) {
    const Mask16 m = first_lanes(half - i);
    const F32x16 x1 = load(x + i, m), x2 = load(x + half + i, m);
    const F32x16 c = load(cos_sin + i, m), s = load(cos_sin + half + i, m);
    store(x + i, fnma(x2, s, mul(x1, c)), m);
    store(x + half + i, fma(x1, s, mul(x2, c)), m);
  }
}

// What 1 / scale may not be taken of: rows this small are stored as zeros.
constexpr float kTinyScale = 1e-30f;

// One head of one token in the cache's type, `n` elements (up to 15 more are written). Returns the scale of kInt8: the
// largest magnitude / 127, or NaN where an element is not finite, so that it shows in what is read back.
inline float narrow_head(const float* x, int n, KvKind kind, void* out) {
  const F32x16 limit = broadcast(65504.0f);
  F32x16 largest = broadcast(0.0f), poison = broadcast(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const F32x16 v = load(x + i, first_lanes(n - i));
    if (kind == KvKind::kF32) {
      store((float*)out + i, v);
    } else if (kind == KvKind::kF16) {  // values beyond fp16 are cut off, not infinite; NaN passes
      store_f16((uint16_t*)out + i, min(limit, max(sub(broadcast(0.0f), limit), v)));
    } else if (kind == KvKind::kBf16) {
      store_bf16((uint16_t*)out + i, v);
    } else {
      largest = max(abs(v), largest);
      poison = fma(v, broadcast(0.0f), poison);
    }
  }
  if (kind != KvKind::kInt8) return 0.0f;
  const float magnitude = max_lane(largest);
  const F32x16 inverse = broadcast(magnitude > kTinyScale ? 127.0f / magnitude : 0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const F32x16 v = round_even(mul(load(x + i, first_lanes(n - i)), inverse));
    store_i8((int8_t*)out + i, min(max(v, broadcast(-127.0f)), broadcast(127.0f)));  // NaN becomes -127, scale NaN
  }
  return (magnitude > kTinyScale ? magnitude / 127.0f : 0.0f) + sum(poison);
}

template <typename T>
inline void scatter_k(uint8_t* k, const void* row, int n, int block_size, int offset) {
  T* to = (T*)k + offset;
  for (int d = 0; d < n; d++) to[(int64_t)d * block_size] = ((const T*)row)[d];
}

inline void write_kv(const KvLayer& kv, int slot, int head, const float* k, const float* v) {
  alignas(kAlign) uint8_t row[sizeof(float) * (kMaxHeadDim + kLanes)];
  const int offset = slot % kv.block_size;
  const KvHead to = kv_head(kv, slot / kv.block_size, head);
  const float k_scale = narrow_head(k, kv.head_dim, kv.kind, row);
  const int64_t bytes = kv_element_bytes(kv.kind);
  if (bytes == 4) scatter_k<uint32_t>(to.k, row, kv.head_dim, kv.block_size, offset);
  if (bytes == 2) scatter_k<uint16_t>(to.k, row, kv.head_dim, kv.block_size, offset);
  if (bytes == 1) scatter_k<uint8_t>(to.k, row, kv.head_dim, kv.block_size, offset);
  const float v_scale = narrow_head(v, kv.head_dim, kv.kind, row);
  std::memcpy(to.v + bytes * kv.head_dim * offset, row, (size_t)(bytes * kv.head_dim));
  if (to.k_scale) {
    to.k_scale[offset] = k_scale;
    to.v_scale[offset] = v_scale;
  }
}

inline void norm_and_rotate(float* x, int num_heads, const float* norm, float eps, const float* cos_sin, int head_dim) {
  for (int head = 0; head < num_heads; head++, x += head_dim) {
    if (norm) norm_group(x, norm, eps, head_dim, x);
    if (cos_sin) rotate_head(x, cos_sin, head_dim / 2);
  }
}

inline void rope_kv(const RopeKvArgs& args, int begin, int end) {
  const KvLayer& kv = *args.kv;
  for (int row = begin; row < end; row++) {
    const float* cos_sin = args.cos_sin ? args.cos_sin + (int64_t)row * kv.head_dim : nullptr;
    norm_and_rotate(args.q + row * args.q_stride, args.num_heads, args.q_norm, args.norm_eps, cos_sin, kv.head_dim);
    if (!args.k) continue;
    float* k = args.k + row * args.k_stride;
    const float* v = args.v + row * args.v_stride;
    norm_and_rotate(k, kv.num_kv_heads, args.k_norm, args.norm_eps, cos_sin, kv.head_dim);
    for (int head = 0; head < kv.num_kv_heads; head++) {
      write_kv(kv, args.slots[row], head, k + head * kv.head_dim, v + head * kv.head_dim);
    }
  }
}

}  // namespace HR_ISA
}  // namespace headrace
