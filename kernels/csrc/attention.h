// Causal attention over KV blocks, for any mix of prefill chunks and decode rows. Part of every isa_*.cpp.
//
// One arithmetic per row, a (query, head) pair, whatever else is in the step and however it is cut (attention_plan.h):
//   - positions are cut at multiples of 64 into chunks; a row's chunks are those that hold a key it sees
//   - in a chunk: score = sum over d of (q[d] scale) K[d], then times the key's scale (kInt8), then the soft cap;
//     m = the largest; p = exp(score - m); l = sum of p, key by key in lane (position mod 16), then across lanes;
//     o[d] = sum over keys in order of p V[d] (kInt8: p times the key's scale)
//   - the first chunk's (m, l, o) absorbs the next ones in order: M = max(m, m'), a = exp(m - M), b = exp(m' - M),
//     l = b l' + a l, o = b o' + a o
//   - out = o * (1 / l)
// A key that a row must not see has weight 0 in l and is left out of o: whatever a freed block holds, NaN included,
// stays there. NaN in a row's own keys, values or query makes the row NaN.
#pragma once

#include <cstring>

#include "activations.h"
#include "attention_view.h"
#include "elementwise.h"
#include "kernel_table.h"
#include "vector_math.h"

namespace headrace::HR_ISA {

// (m, l, o) of some rows.
struct RowSums {
  float* maxima;
  float* sums;
  float* values;
  int64_t stride;  // floats between rows of values
};

inline RowSums sums_so_far(const AttentionJob& job, int row) {
  AttentionScratch& scratch = job.scratch;
  return {scratch.maxima + row, scratch.sums + row, scratch.values[row], kAttentionStride};
}

inline RowSums partial_sums(const AttentionJob& job, int chunk, int row) {
  const AttentionPlan& plan = *(const AttentionPlan*)job.args.plan;
  const AttentionSplit& split = plan.splits[job.item.split];
  const int64_t num_chunks = split.chunk_end - split.chunk_begin;
  const int64_t index = (int64_t)(chunk - split.chunk_begin) * job.num_rows + row;
  float* maxima = plan.partials + split.partials;
  float* values = maxima + attention_values_offset(num_chunks, job.num_rows);
  return {maxima + index, maxima + num_chunks * job.num_rows + index, values + index * job.padded_dim, job.padded_dim};
}

// Which of a chunk's keys a row sees: [begin, end), counted from the chunk's first.
struct KeyRange {
  int begin, end;
};
inline KeyRange keys_in_chunk(const AttentionJob& job, int row, int chunk) {
  const int base = chunk * kAttentionChunk;
  const int begin = job.scratch.first_keys[row] - base, end = job.scratch.last_keys[row] + 1 - base;
  return {begin > 0 ? begin : 0, end < kAttentionChunk ? end : kAttentionChunk};
}
inline bool is_first_chunk(const AttentionJob& job, int row, int chunk) {
  return job.scratch.first_keys[row] / kAttentionChunk == chunk;
}

// The lanes of tile `tile` whose keys are in `range`.
inline Mask16 lanes_seen(KeyRange range, int tile) {
  const int begin = range.begin - tile * kLanes, end = range.end - tile * kLanes;
  if (begin >= kLanes || end <= 0) return 0;
  return (Mask16)(first_lanes(end) & ~(begin > 0 ? first_lanes(begin) : 0));
}

// Scores of one row to weights, in place. Tiles [tile, tile_end) hold all keys of `range`. Returns m and l.
struct Softened {
  float maximum, sum;
};
inline Softened soften_row(float* scores, KeyRange range, int tile, int tile_end, const ChunkView& view, float cap) {
  const F32x16 unseen = broadcast(-__builtin_inff());
  F32x16 largest = unseen;
  for (int t = tile; t < tile_end; t++) {
    F32x16 s = load(scores + t * kLanes);
    if (view.k_scale[t]) s = mul(s, load(view.k_scale[t]));
    if (cap > 0.0f) s = mul(broadcast(cap), tanh(div(s, broadcast(cap))));
    s = select(lanes_seen(range, t), s, unseen);
    store(scores + t * kLanes, s);
    largest = max(s, largest);
  }
  const float maximum = max_lane(largest);
  F32x16 total = broadcast(0.0f);
  for (int t = tile; t < tile_end; t++) {
    F32x16 p = exp_weight(sub(load(scores + t * kLanes), broadcast(maximum)));  // 0 for keys that are not seen
    total = add(total, p);
    if (view.v_scale[t]) p = mul(p, load(view.v_scale[t]));
    store(scores + t * kLanes, p);
  }
  return {maximum, sum(total)};
}

// so_far absorbs a later chunk, or becomes it where it is the row's first.
inline void absorb_chunk(const AttentionJob& job, int row, int num_rows, int chunk, RowSums later) {
  alignas(kAlign) float keep[kLanes], take[kLanes];
  const RowSums so_far = sums_so_far(job, row);
  const Mask16 rows = first_lanes(num_rows);
  const F32x16 old_maxima = load(so_far.maxima, rows), new_maxima = load(later.maxima, rows);
  const F32x16 maxima = max(old_maxima, new_maxima);
  const F32x16 a = exp_weight(sub(old_maxima, maxima)), b = exp_weight(sub(new_maxima, maxima));
  const F32x16 sums = fma(b, load(later.sums, rows), mul(a, load(so_far.sums, rows)));
  store(keep, a);
  store(take, b);
  Mask16 merged = 0, assigned = 0;
  for (int r = 0; r < num_rows; r++) {
    const KeyRange range = keys_in_chunk(job, row + r, chunk);
    if (range.begin >= range.end) continue;
    float* values = so_far.values + r * so_far.stride;
    const float* addend = later.values + r * later.stride;
    if (is_first_chunk(job, row + r, chunk)) {
      assigned |= (Mask16)(1u << r);
      std::memcpy(values, addend, sizeof(float) * (size_t)job.padded_dim);
      continue;
    }
    merged |= (Mask16)(1u << r);
    const F32x16 old_weight = broadcast(keep[r]), new_weight = broadcast(take[r]);
    for (int d = 0; d < job.padded_dim; d += kLanes) {
      store(values + d, fma(new_weight, load(addend + d), mul(old_weight, load(values + d))));
    }
  }
  store(so_far.maxima, maxima, merged);
  store(so_far.sums, sums, merged);
  store(so_far.maxima, new_maxima, assigned);
  store(so_far.sums, load(later.sums, rows), assigned);
}

// (m, l, o) of a chunk for Rows rows from `row` on.
template <KvKind Kind, int Rows>
inline void attend_rows(const AttentionJob& job, const ChunkView& view, int chunk, int row) {
  KeyRange ranges[Rows];
  int first = kAttentionChunk, last = 0, shared_begin = 0, shared_end = kAttentionChunk;
  bool is_first = true;
  for (int r = 0; r < Rows; r++) {
    ranges[r] = keys_in_chunk(job, row + r, chunk);
    const KeyRange range = ranges[r];
    is_first &= is_first_chunk(job, row + r, chunk);
    if (range.begin > shared_begin) shared_begin = range.begin;
    if (range.end < shared_end) shared_end = range.end;
    if (range.begin >= range.end) continue;
    if (range.begin < first) first = range.begin;
    if (range.end > last) last = range.end;
  }
  if (first >= last) return;
  AttentionScratch& scratch = job.scratch;
  const bool is_split = job.item.split >= 0;
  alignas(kAlign) float chunk_maxima[kLanes], chunk_sums[kLanes];
  RowSums to = {chunk_maxima, chunk_sums, scratch.chunk_values[0], kAttentionStride};
  if (is_split) to = partial_sums(job, chunk, row);
  if (!is_split && is_first) to = sums_so_far(job, row);

  float* weights = scratch.weights[0];
  const int tile = first / kLanes, tile_end = (last + kLanes - 1) / kLanes;
  score_chunk<Kind, Rows>(scratch.q[row], job.head_dim, view, tile, tile_end, weights);
  for (int r = 0; r < Rows; r++) {
    const Softened softened =
        soften_row(weights + r * kAttentionChunk, ranges[r], tile, tile_end, view, job.args.soft_cap);
    to.maxima[r] = softened.maximum;
    to.sums[r] = softened.sum;
  }
  // Keys that all rows see go together; those before and after, row by row.
  if (shared_begin > shared_end) shared_begin = shared_end = first;
  bool from_zero = true;
  for (int r = 0; r < Rows; r++) from_zero &= ranges[r].begin >= shared_begin && shared_begin < shared_end;
  for (int r = 0; !from_zero && r < Rows; r++) {
    const int end = shared_begin < ranges[r].end ? shared_begin : ranges[r].end;
    weigh_values<Kind, 1>(weights + r * kAttentionChunk, view, ranges[r].begin, end, job.padded_dim, true,
                          to.values + r * to.stride, to.stride);
  }
  if (shared_begin < shared_end) {
    weigh_values<Kind, Rows>(weights, view, shared_begin, shared_end, job.padded_dim, from_zero, to.values, to.stride);
  }
  for (int r = 0; r < Rows; r++) {
    const int begin = shared_end > ranges[r].begin ? shared_end : ranges[r].begin;
    if (begin >= ranges[r].end) continue;
    weigh_values<Kind, 1>(weights + r * kAttentionChunk, view, begin, ranges[r].end, job.padded_dim, false,
                          to.values + r * to.stride, to.stride);
  }
  if (!is_split && !is_first) absorb_chunk(job, row, Rows, chunk, to);
}

// All rows of the item, a few at a time while the chunk's keys are in the first cache.
template <KvKind Kind>
inline void attend_chunk(const AttentionJob& job, const ChunkView& view, int chunk) {
  int row = 0;
  for (; row + kAttentionStep <= job.num_rows; row += kAttentionStep) {
    attend_rows<Kind, kAttentionStep>(job, view, chunk, row);
  }
  switch (job.num_rows - row) {
    case 5:
      attend_rows<Kind, 3>(job, view, chunk, row);
      return attend_rows<Kind, 2>(job, view, chunk, row + 3);
    case 4:
      return attend_rows<Kind, 4>(job, view, chunk, row);
    case 3:
      return attend_rows<Kind, 3>(job, view, chunk, row);
    case 2:
      return attend_rows<Kind, 2>(job, view, chunk, row);
    case 1:
      return attend_rows<Kind, 1>(job, view, chunk, row);
  }
}

inline void attend_chunk(const AttentionJob& job, const ChunkView& view, int chunk) {
  switch (job.args.kv->kind) {
    case KvKind::kF32:
      return attend_chunk<KvKind::kF32>(job, view, chunk);
    case KvKind::kF16:
      return attend_chunk<KvKind::kF16>(job, view, chunk);
    case KvKind::kBf16:
      return attend_chunk<KvKind::kBf16>(job, view, chunk);
    case KvKind::kInt8:
      return attend_chunk<KvKind::kInt8>(job, view, chunk);
  }
}

// All chunks of the item; `next` is the item that this thread, or another, will work on soon, or null.
inline void attend_item(const AttentionJob& job, const AttentionItem* next) {
  const AttentionItem& item = job.item;
  const KvLayer& kv = *job.args.kv;
  const bool is_direct = kv.block_size % kLanes == 0 && job.padded_dim == kv.head_dim;
  ChunkView view = {};
  if (is_direct) view = view_of_blocks(job.args, item, next, item.chunk_begin * kAttentionChunk);
  for (int chunk = item.chunk_begin; chunk < item.chunk_end; chunk++) {
    if (!is_direct) {
      view = view_of_copies(job, chunk);
      view.next = &view;
      attend_chunk<KvKind::kF32>(job, view, chunk);
      continue;
    }
    const ChunkView ahead = view_of_blocks(job.args, item, next, (chunk + 1) * kAttentionChunk);
    view.next = &ahead;
    attend_chunk(job, view, chunk);
    view = ahead;
  }
}

// Scaled queries, and the positions that each row sees.
inline void start_rows(const AttentionJob& job) {
  const AttentionArgs& args = job.args;
  const int first_query = args.cu_seqlens_q[job.item.sequence];
  const int num_queries = args.cu_seqlens_q[job.item.sequence + 1] - first_query;
  const F32x16 scale = broadcast(args.scale);
  for (int row = 0; row < job.num_rows; row++) {
    const int query = (job.item.row_begin + row) / job.group;
    const int head = job.item.kv_head * job.group + (job.item.row_begin + row) % job.group;
    const int position = args.seq_lens[job.item.sequence] - num_queries + query;
    const int first = args.window ? position - args.window + 1 : 0;
    job.scratch.first_keys[row] = first > 0 ? first : 0;
    job.scratch.last_keys[row] = position;
    const float* q = args.q + (first_query + query) * args.q_stride + head * job.head_dim;
    for (int d = 0; d < job.head_dim; d += kLanes) {
      const Mask16 m = first_lanes(job.head_dim - d);
      store(job.scratch.q[row] + d, mul(load(q + d, m), scale));
    }
  }
}

inline void finish_rows(const AttentionJob& job) {
  const AttentionArgs& args = job.args;
  const int first_query = args.cu_seqlens_q[job.item.sequence];
  for (int row = 0; row < job.num_rows; row++) {
    const int token = first_query + (job.item.row_begin + row) / job.group;
    const int head = job.item.kv_head * job.group + (job.item.row_begin + row) % job.group;
    const F32x16 inverse = broadcast(1.0f / job.scratch.sums[row]);
    float* values = job.scratch.values[row];
    float* out = args.out ? args.out + token * args.out_stride + head * job.head_dim : values;
    for (int d = 0; d < job.head_dim; d += kLanes) {
      store(out + d, mul(load(values + d), inverse), first_lanes(job.head_dim - d));
    }
    for (int d = 0; args.quantized && d < job.head_dim; d += kGroup) {
      quantize_group(out + d, *args.quantized, token, (head * job.head_dim + d) / kGroup);
    }
  }
}

// True for the item of a split that finishes last: the sums of all chunks are then in scratch.
inline bool merge_split(const AttentionJob& job) {
  AttentionSplit& split = ((const AttentionPlan*)job.args.plan)->splits[job.item.split];
  if (__atomic_add_fetch(&split.num_done, 1, __ATOMIC_ACQ_REL) < split.num_items) return false;
  __atomic_store_n(&split.num_done, 0, __ATOMIC_RELAXED);  // for the next layer, which opens when all items are done
  for (int chunk = split.chunk_begin; chunk < split.chunk_end; chunk++) {
    for (int row = 0; row < job.num_rows; row += kLanes) {
      const int num_rows = job.num_rows - row < kLanes ? job.num_rows - row : kLanes;
      absorb_chunk(job, row, num_rows, chunk, partial_sums(job, chunk, row));
    }
  }
  return true;
}

inline void attention(const AttentionArgs& args, int begin, int end) {
  const AttentionPlan& plan = *(const AttentionPlan*)args.plan;
  const KvLayer& kv = *args.kv;
  for (int i = begin; i < end; i++) {
    const AttentionItem& item = plan.items[i];
    const AttentionJob job = {args,
                              item,
                              *(AttentionScratch*)args.scratch,
                              item.row_end - item.row_begin,
                              args.num_heads / kv.num_kv_heads,
                              kv.head_dim,
                              (kv.head_dim + kLanes - 1) / kLanes * kLanes};
    start_rows(job);
    attend_item(job, i + 1 < plan.num_items ? &item + 1 : nullptr);
    if (item.split < 0 || merge_split(job)) finish_rows(job);
  }
}

}  // namespace headrace::HR_ISA
