// Cuts one step's attention into items, so that threads finish together. See attention_plan.h.
#include "attention_plan.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

namespace headrace {
namespace {

// Items per thread that are worth having: enough that the last one to finish is not far behind. 6 rather than 4: three
// KV heads on two threads then come in four parts each, and 12 items halve where 9 do not.
constexpr int kItemsPerThread = 6;
constexpr int64_t kMaxPartialFloats = 1 << 20;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What planning one step needs to know of a sequence.
struct Sequence {
  int32_t index;
  int32_t num_rows;        // (query, head) pairs of a KV head
  int32_t first_position;  // of the first query
  int32_t group;           // query heads per KV head
  int32_t window;

  int32_t position(int row) const { return first_position + row / group; }
  int32_t first_key(int row) const { return window ? std::max(position(row) - window + 1, 0) : 0; }
  int64_t num_keys(int row) const { return position(row) + 1 - first_key(row); }
  int64_t work(int row_begin, int row_end) const {  // keys grow evenly from row to row, or nearly
    return (num_keys(row_begin) + num_keys(row_end - 1)) * (row_end - row_begin) / 2;
  }
};

Sequence sequence_of(const AttentionArgs& shapes, int index) {
  const int num_queries = shapes.cu_seqlens_q[index + 1] - shapes.cu_seqlens_q[index];
  const int group = shapes.num_heads / shapes.kv->num_kv_heads;
  return {index, num_queries * group, shapes.seq_lens[index] - num_queries, group, shapes.window};
}

}  // namespace

struct AttentionPlan::Memory {
  std::vector<AttentionItem> items;
  std::vector<AttentionSplit> splits;
  int64_t num_partial_floats = 0;  // in use
};

AttentionPlan::AttentionPlan() : num_items(0), items(nullptr), splits(nullptr), partials(nullptr), memory(new Memory) {}

AttentionPlan::~AttentionPlan() {
  std::free(partials);
  delete memory;
}

namespace {

// The partial sums' memory is taken once, at its largest: pages that no step needs are never touched.
void take_partials(AttentionPlan& plan) {
  if (plan.partials) return;
  plan.partials = (float*)std::aligned_alloc(kAlign, kMaxPartialFloats * sizeof(float));
  if (!plan.partials) throw std::bad_alloc();
}

void add_item(AttentionPlan& plan, AttentionItem item, const Sequence& sequence) {
  const int first = std::max(sequence.first_key(item.row_begin), item.chunk_begin * kAttentionChunk);
  const int end = std::min(sequence.position(item.row_end - 1) + 1, item.chunk_end * kAttentionChunk);
  const int64_t all_keys = sequence.position(item.row_end - 1) + 1 - sequence.first_key(item.row_begin);
  item.work = (int32_t)(sequence.work(item.row_begin, item.row_end) * (end - first) / all_keys);
  plan.memory->items.push_back(item);
}

// Shares the chunks of `item` out over several items where it is more than its share of the step.
void add_items(AttentionPlan& plan, AttentionItem item, const Sequence& sequence, int64_t target, int head_dim) {
  const int num_chunks = item.chunk_end - item.chunk_begin;
  const int64_t num_rows = item.row_end - item.row_begin;
  const int64_t work = sequence.work(item.row_begin, item.row_end);
  const int64_t num_parts = std::min<int64_t>(ceil_div(work, target), num_chunks);
  const int64_t floats = attention_partial_floats(num_chunks, num_rows, head_dim);
  AttentionPlan::Memory& memory = *plan.memory;
  if (2 * work < 3 * target || num_parts < 2 || memory.num_partial_floats + floats > kMaxPartialFloats) {
    return add_item(plan, item, sequence);
  }
  item.split = (int32_t)memory.splits.size();
  memory.splits.push_back({(int32_t)num_parts, 0, item.chunk_begin, item.chunk_end, memory.num_partial_floats});
  memory.num_partial_floats += floats;
  for (int64_t part = 0; part < num_parts; part++) {
    AttentionItem piece = item;
    piece.chunk_begin = item.chunk_begin + (int32_t)(num_chunks * part / num_parts);
    piece.chunk_end = item.chunk_begin + (int32_t)(num_chunks * (part + 1) / num_parts);
    add_item(plan, piece, sequence);
  }
}

// Rows per item: as many as share each key well, fewer where the step would then have too few items.
int rows_per_item(const Sequence& sequence, int64_t target) {
  const int64_t keys = ceil_div(sequence.work(0, sequence.num_rows), sequence.num_rows);
  const int64_t wanted =
      std::clamp<int64_t>(target / keys / kAttentionStep * kAttentionStep, kAttentionStep, kAttentionRows);
  const int64_t num_tiles = ceil_div(sequence.num_rows, wanted);
  return (int)(ceil_div(ceil_div(sequence.num_rows, num_tiles), kAttentionStep) * kAttentionStep);
}

bool comes_first(const AttentionItem& a, const AttentionItem& b) {
  if (a.work != b.work) return a.work > b.work;
  if (a.sequence != b.sequence) return a.sequence < b.sequence;
  if (a.kv_head != b.kv_head) return a.kv_head < b.kv_head;
  if (a.row_begin != b.row_begin) return a.row_begin < b.row_begin;
  return a.chunk_begin < b.chunk_begin;
}

}  // namespace

void reserve_attention_plan(AttentionPlan& plan, const KvLayer& kv, int num_heads, int max_rows, int num_threads) {
  const int64_t group = num_heads / kv.num_kv_heads;
  // Every row of the step alone with its heads in tiles, and what splitting adds: an item is split only where it is
  // more than a share of 1 / (threads * kItemsPerThread) of the step.
  const int64_t num_split = 2 * (int64_t)num_threads * kItemsPerThread;
  plan.memory->items.reserve((size_t)(max_rows * kv.num_kv_heads * ceil_div(group, kAttentionStep) + num_split));
  plan.memory->splits.reserve((size_t)num_split);
  take_partials(plan);
}

size_t attention_plan_capacity(const AttentionPlan& plan) {
  return plan.memory->items.capacity() + plan.memory->splits.capacity();
}

void plan_attention(const AttentionArgs& shapes, int num_threads, AttentionPlan& plan) {
  AttentionPlan::Memory& memory = *plan.memory;
  take_partials(plan);
  memory.items.clear();
  memory.splits.clear();
  memory.num_partial_floats = 0;
  const int num_kv_heads = shapes.kv->num_kv_heads;
  int64_t total = 0;
  for (int i = 0; i < shapes.num_seqs; i++) {
    const Sequence sequence = sequence_of(shapes, i);
    if (sequence.num_rows) total += sequence.work(0, sequence.num_rows) * num_kv_heads;
  }
  const int64_t target = num_threads == 1 ? total + 1 : ceil_div(total, num_threads * kItemsPerThread);
  for (int i = 0; i < shapes.num_seqs; i++) {
    const Sequence sequence = sequence_of(shapes, i);
    if (!sequence.num_rows) continue;
    const int rows = rows_per_item(sequence, target);
    for (int head = 0; head < num_kv_heads; head++) {
      for (int row = 0; row < sequence.num_rows; row += rows) {
        const int end = std::min(row + rows, sequence.num_rows);
        const int chunk_begin = sequence.first_key(row) / kAttentionChunk;
        const int chunk_end = sequence.position(end - 1) / kAttentionChunk + 1;
        add_items(plan, {i, head, row, end, chunk_begin, chunk_end, -1, 0}, sequence, target, shapes.kv->head_dim);
      }
    }
  }
  if (num_threads > 1) std::sort(memory.items.begin(), memory.items.end(), comes_first);
  plan.num_items = (int32_t)memory.items.size();
  plan.items = memory.items.data();
  plan.splits = memory.splits.data();
}

}  // namespace headrace
