// Where the keys and values of a chunk lie in the KV blocks, and what to fetch meanwhile. Used by attention.h.
#pragma once

#include "attention_tile.h"
#include "kernel_table.h"
#include "kv.h"

namespace headrace::HR_ISA {

// An item and what it needs at hand. Rows are counted from the item's first.
struct AttentionJob {
  const AttentionArgs& args;
  const AttentionItem& item;
  AttentionScratch& scratch;
  int num_rows, group, head_dim, padded_dim;
};

// The end of an item's keys, as a position.
inline int end_of_keys(const AttentionArgs& args, const AttentionItem& item) {
  const int length = args.seq_lens[item.sequence], end = item.chunk_end * kAttentionChunk;
  return length < end ? length : end;
}

// Where the 16 keys from `position` on lie, for block sizes and head dimensions that are multiples of 16.
inline void set_tile(const AttentionArgs& args, const AttentionItem& item, int position, int t, ChunkView& view) {
  const KvLayer& kv = *args.kv;
  const int32_t* blocks = args.block_tables + item.sequence * args.block_table_width;
  const int64_t bytes = kv_element_bytes(kv.kind);
  const int block = position / kv.block_size, offset = position - block * kv.block_size;
  const KvHead head = kv_head(kv, blocks[block], item.kv_head);
  view.k[t] = head.k + bytes * offset;
  view.v[t] = head.v + bytes * offset * kv.head_dim;
  if (head.k_scale) {
    view.k_scale[t] = head.k_scale + offset;
    view.v_scale[t] = head.v_scale + offset;
  }
}

// The chunk from `base` on. Where the item has no keys left there, its place is taken by keys of the next item, if
// there is one, so that a short last chunk does not leave them to be waited for.
inline ChunkView view_of_blocks(const AttentionArgs& args, const AttentionItem& item, const AttentionItem* next,
                                int base) {
  const int end = (end_of_keys(args, item) + kLanes - 1) / kLanes * kLanes;
  ChunkView view = {};
  view.k_stride = args.kv->block_size;
  view.v_stride = args.kv->head_dim;
  for (int t = 0; t < kKeyTiles; t++) {
    const int position = base + t * kLanes;
    const int behind = next ? next->chunk_begin * kAttentionChunk + position - end : 0;
    if (position < end) {
      set_tile(args, item, position, t, view);
    } else if (next && behind < end_of_keys(args, *next)) {
      set_tile(args, *next, behind, t, view);
    } else {
      set_tile(args, item, end - kLanes, t, view);  // nothing new
    }
  }
  return view;
}

// n elements, `stride` apart, as float32; up to 15 zeros follow.
template <KvKind Kind>
inline void widen_row(const void* from, int64_t stride, int n, float* to) {
  using Element = KvElement<Kind>;
  typename Element::Type row[kMaxHeadDim] = {};
  for (int i = 0; i < n; i++) row[i] = ((const typename Element::Type*)from)[i * stride];
  for (int i = 0; i < n; i += kLanes) store(to + i, Element::widen(row + i));
}
inline void widen_row(KvKind kind, const void* from, int64_t stride, int n, float* to) {
  if (kind == KvKind::kF32) return widen_row<KvKind::kF32>(from, stride, n, to);
  if (kind == KvKind::kF16) return widen_row<KvKind::kF16>(from, stride, n, to);
  if (kind == KvKind::kBf16) return widen_row<KvKind::kBf16>(from, stride, n, to);
  widen_row<KvKind::kInt8>(from, stride, n, to);
}

// The same for any block size and head dimension: copies in float32, of the positions alone that rows of the item see.
inline ChunkView view_of_copies(const AttentionJob& job, int chunk) {
  const KvLayer& kv = *job.args.kv;
  const int base = chunk * kAttentionChunk, seen_end = job.scratch.last_keys[job.num_rows - 1] + 1;
  const int begin = base > job.scratch.first_keys[0] ? base : job.scratch.first_keys[0];
  const int end = base + kAttentionChunk < seen_end ? base + kAttentionChunk : seen_end;
  const int32_t* blocks = job.args.block_tables + job.item.sequence * job.args.block_table_width;
  const int64_t bytes = kv_element_bytes(kv.kind);
  AttentionScratch& scratch = job.scratch;
  alignas(kAlign) float row[kMaxHeadDim];
  ChunkView view = {};
  view.k_stride = kLanes;
  view.v_stride = job.padded_dim;
  for (int t = 0; t < kKeyTiles; t++) {
    view.k[t] = scratch.k + t * kLanes * kMaxHeadDim;
    view.v[t] = scratch.v + t * kLanes * kMaxHeadDim;
    if (kv.kind != KvKind::kInt8) continue;
    view.k_scale[t] = scratch.k_scales + t * kLanes;
    view.v_scale[t] = scratch.v_scales + t * kLanes;
  }
  for (int position = begin; position < end; position++) {
    const int key = position % kAttentionChunk, t = key / kLanes, offset = position % kv.block_size;
    const KvHead head = kv_head(kv, blocks[position / kv.block_size], job.item.kv_head);
    widen_row(kv.kind, head.k + bytes * offset, kv.block_size, kv.head_dim, row);
    for (int d = 0; d < kv.head_dim; d++) scratch.k[(t * kMaxHeadDim + d) * kLanes + key % kLanes] = row[d];
    float* v = scratch.v + t * kLanes * kMaxHeadDim + key % kLanes * job.padded_dim;
    widen_row(kv.kind, head.v + bytes * offset * kv.head_dim, 1, kv.head_dim, v);
    if (!head.k_scale) continue;
    scratch.k_scales[key] = head.k_scale[offset];
    scratch.v_scales[key] = head.v_scale[offset];
  }
  return view;
}

}  // namespace headrace::HR_ISA
