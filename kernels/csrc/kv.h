// Where a token's key and value lie in the KV blocks of a layer: layout.h's KvLayer as addresses and sizes. Used by
// rope.h (writes), attention.h (reads), the executor and the op tests. Internal linkage throughout: these functions are
// compiled for several instruction sets, and the linker must not merge them.
#pragma once

#include "layout.h"

namespace headrace {

constexpr int kMaxHeadDim = 256;

static inline int64_t kv_element_bytes(KvKind kind) { return kind == KvKind::kF32 ? 4 : kind == KvKind::kInt8 ? 1 : 2; }

// Bytes of one KV head within a block, a multiple of 64: K [head_dim][block_size], V [block_size][head_dim], and for
// kInt8 the float32 scales of K and V, [block_size] each.
static inline int64_t kv_head_bytes(KvKind kind, int head_dim, int block_size) {
  int64_t bytes = 2 * kv_element_bytes(kind) * head_dim * block_size;
  if (kind == KvKind::kInt8) bytes += 2 * (int64_t)sizeof(float) * block_size;
  return (bytes + (int64_t)kAlign - 1) / (int64_t)kAlign * (int64_t)kAlign;
}

static inline int64_t kv_block_bytes(KvKind kind, int num_kv_heads, int head_dim, int block_size) {
  return num_kv_heads * kv_head_bytes(kind, head_dim, block_size);
}

// One head of one block.
struct KvHead {
  uint8_t* k;      // element (d, slot) at d * block_size + slot
  uint8_t* v;      // element (slot, d) at slot * head_dim + d
  float* k_scale;  // [block_size]; null but for kInt8
  float* v_scale;
};

static inline KvHead kv_head(const KvLayer& kv, int64_t block, int head) {
  uint8_t* base = kv.data + block * kv.block_bytes + head * kv.head_bytes;
  const int64_t half = kv_element_bytes(kv.kind) * kv.head_dim * kv.block_size;
  KvHead result = {base, base + half, nullptr, nullptr};
  if (kv.kind == KvKind::kInt8) {
    result.k_scale = (float*)(base + 2 * half);
    result.v_scale = result.k_scale + kv.block_size;
  }
  return result;
}

}  // namespace headrace
