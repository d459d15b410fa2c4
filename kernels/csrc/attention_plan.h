// How one step's attention is cut into items of work for the threads. Made once per step and window by the executor
// (plan_attention), read by every layer that attends alike (attention.h). What an item computes does not depend on how
// the step was cut: see attention.h.
#pragma once

#include "kernel_table.h"
#include "kv.h"

namespace headrace {

// Positions are cut at multiples of this into chunks, each with a softmax of its own; chunks are merged in order. Part
// of the arithmetic's definition: it must not depend on the batch. 64 rather than 128 or 256 so that three KV heads of
// a short context still share out over two threads; the merge costs about 4 % of a chunk.
constexpr int kAttentionChunk = 64;

// The most rows of an item. A row is one (query, head) pair: for the g query heads of a KV head, row g * i + h is head
// h of the sequence's i-th query of this step.
constexpr int kAttentionRows = 48;

// The rows of an item that are computed together.
constexpr int kAttentionStep = 6;

struct AttentionItem {
  int32_t sequence;
  int32_t kv_head;
  int32_t row_begin, row_end;
  int32_t chunk_begin, chunk_end;
  int32_t split;  // index into AttentionPlan::splits, or -1: the item covers all its rows' chunks
  int32_t work;   // keys * rows
};

// Rows whose chunks are shared out over several items. Each item leaves its chunks' sums in `partials`; the one that
// finishes last merges them in order and sets num_done back to 0 for the next layer.
struct AttentionSplit {
  int32_t num_items;
  int32_t num_done;
  int32_t chunk_begin, chunk_end;
  int64_t partials;  // offset in floats, see attention_partial_floats
};

// Owned by the executor; keeps its memory from step to step. Plain pointers, as kernels of every instruction set read
// it.
struct AttentionPlan {
  AttentionPlan();
  ~AttentionPlan();
  AttentionPlan(const AttentionPlan&) = delete;
  AttentionPlan& operator=(const AttentionPlan&) = delete;

  int32_t num_items;
  const AttentionItem* items;  // biggest first
  AttentionSplit* splits;
  float* partials;
  struct Memory;
  Memory* memory;
};

// Takes the memory that any step of up to max_rows tokens can need, so that no later plan allocates.
void reserve_attention_plan(AttentionPlan& plan, const KvLayer& kv, int num_heads, int max_rows, int num_threads);

// Items and splits that fit without another allocation, in one number: for tests.
size_t attention_plan_capacity(const AttentionPlan& plan);

// Reads kv (not its data), num_heads, num_seqs, seq_lens, cu_seqlens_q and window of `shapes`.
void plan_attention(const AttentionArgs& shapes, int num_threads, AttentionPlan& plan);

// Floats between rows of AttentionScratch: not a multiple of 4 KiB, so that rows do not compete for cache sets.
constexpr int kAttentionStride = kMaxHeadDim + kLanes;

// What one thread needs while it works on an item.
struct AttentionScratch {
  alignas(kAlign) float q[kAttentionRows][kAttentionStride];       // scaled queries
  alignas(kAlign) float values[kAttentionRows][kAttentionStride];  // weighted values of the chunks so far
  alignas(kAlign) float maxima[kAttentionRows];                    // of the scores of the chunks so far
  alignas(kAlign) float sums[kAttentionRows];                      // of the weights of the chunks so far
  int32_t first_keys[kAttentionRows];  // positions of the first and last key that each row sees
  int32_t last_keys[kAttentionRows];
  alignas(kAlign) float chunk_values[kAttentionStep][kAttentionStride];
  alignas(kAlign) float weights[kAttentionStep][kAttentionChunk];
  // Copies of K and V in float32, for head_dim or block_size that are no multiples of 16.
  alignas(kAlign) float k[kMaxHeadDim * kAttentionChunk];
  alignas(kAlign) float v[kMaxHeadDim * kAttentionChunk];
  alignas(kAlign) float k_scales[kAttentionChunk];
  alignas(kAlign) float v_scales[kAttentionChunk];
};

// Bytes that each thread needs as AttentionArgs::scratch, whatever the step; 64-byte aligned.
constexpr size_t attention_scratch_bytes() { return sizeof(AttentionScratch); }

// Where the sums of a split's `num_rows` rows lie: chunk c (from 0), row r:
//   maximum at (c * num_rows + r), sum at the same place num_chunks * num_rows further on,
//   then from attention_values_offset on the weighted values, [num_chunks][num_rows][padded head_dim].
static inline int64_t attention_values_offset(int64_t num_chunks, int64_t num_rows) {
  return (2 * num_chunks * num_rows + kLanes - 1) / kLanes * kLanes;
}
static inline int64_t attention_partial_floats(int64_t num_chunks, int64_t num_rows, int head_dim) {
  const int64_t padded = (head_dim + kLanes - 1) / kLanes * kLanes;
  return attention_values_offset(num_chunks, num_rows) + num_chunks * num_rows * padded;
}

}  // namespace headrace
