// The C functions of single ops that are no matrix product (headrace_native.h), for tests and benches. All arguments
// are checked before memory is touched: callers get a sentence, never a crash.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <memory>
#include <thread>
#include <vector>

#include "attention_plan.h"
#include "error.h"
#include "headrace_native.h"
#include "kernel_table.h"
#include "kv.h"

using namespace headrace;

namespace {

bool is_aligned(const void* p) { return (uintptr_t)p % kAlign == 0; }

const KernelTable* kernels_of(const char* isa) {
  const KernelTable* table = choose_kernels(isa ? isa : std::getenv("HEADRACE_NATIVE_ISA"));
  if (!table) fail("the kernels %s cannot run here", isa ? isa : "that HEADRACE_NATIVE_ISA names");
  return table;
}

int check_rows(const char* what, const void* data, int64_t stride, int32_t rows, int32_t width) {
  if (!data) return fail("%s is null", what);
  if (rows <= 0 || width <= 0) return fail("%s has rows and columns, not %d x %d", what, rows, width);
  if (stride < width) return fail("rows of %s are %lld apart, not %d", what, (long long)stride, width);
  return 0;
}

int check_quantized(const uint8_t* data, int64_t bytes, int32_t rows, int32_t width, int32_t bits) {
  if (bits != 8 && bits != 16) return fail("activations have 8 or 16 bits, not %d", bits);
  if (width % kGroup) return fail("%d features are no multiple of %d", width, kGroup);
  if (!is_aligned(data)) return fail("activations are not aligned to %d bytes", (int)kAlign);
  const int64_t needed = (int64_t)activation_bytes(rows, width, bits);
  if (bytes < needed) return fail("activations need %lld bytes, not %lld", (long long)needed, (long long)bytes);
  return 0;
}

int check_kv_shape(int32_t kind, int32_t num_kv_heads, int32_t head_dim, int32_t block_size) {
  if (kind < 0 || kind > 3) return fail("there is no KV kind %d", kind);
  if (num_kv_heads <= 0 || num_kv_heads > 4096) return fail("num_kv_heads is %d", num_kv_heads);
  if (head_dim <= 0 || head_dim > kMaxHeadDim || head_dim % 8)
    return fail("head_dim is %d, not a multiple of 8 up to %d", head_dim, kMaxHeadDim);
  if (block_size <= 0 || block_size > 4096) return fail("block_size is %d", block_size);
  return 0;
}

int check_kv(const HrKv& kv) {
  if (check_kv_shape(kv.kind, kv.num_kv_heads, kv.head_dim, kv.block_size)) return -1;
  if (!kv.data || !is_aligned(kv.data)) return fail("KV blocks are null or not aligned to %d bytes", (int)kAlign);
  if (kv.num_blocks <= 0) return fail("num_blocks is %d", kv.num_blocks);
  const int64_t block = kv_block_bytes((KvKind)kv.kind, kv.num_kv_heads, kv.head_dim, kv.block_size);
  if (kv.data_bytes / block < kv.num_blocks) return fail("%d KV blocks need more memory", kv.num_blocks);
  return 0;
}

KvLayer kv_layer(const HrKv& kv) {
  const KvKind kind = (KvKind)kv.kind;
  return {kv.data,
          kv_block_bytes(kind, kv.num_kv_heads, kv.head_dim, kv.block_size),
          kv_head_bytes(kind, kv.head_dim, kv.block_size),
          kind,
          kv.num_kv_heads,
          kv.head_dim,
          kv.block_size};
}

int check_rope_kv(const HrRopeKv* op) {
  if (!op) return fail("rope_kv is null");
  if (check_kv(op->kv)) return -1;
  if (op->num_heads <= 0) return fail("num_heads is %d", op->num_heads);
  if (check_rows("q", op->q, op->q_stride, op->rows, op->num_heads * op->kv.head_dim)) return -1;
  if (!op->k) return 0;
  const int32_t width = op->kv.num_kv_heads * op->kv.head_dim;
  if (check_rows("k", op->k, op->k_stride, op->rows, width)) return -1;
  if (check_rows("v", op->v, op->v_stride, op->rows, width)) return -1;
  if (!op->slots) return fail("slots are null");
  for (int i = 0; i < op->rows; i++)
    if (op->slots[i] < 0 || op->slots[i] / op->kv.block_size >= op->kv.num_blocks)
      return fail("slot %d of row %d is in no block", op->slots[i], i);
  return 0;
}

int check_sequence(const HrAttention& op, int index) {
  const int32_t rows = op.cu_seqlens_q[index + 1] - op.cu_seqlens_q[index], seq_len = op.seq_lens[index];
  if (rows < 0) return fail("cu_seqlens_q falls at sequence %d", index);
  if (seq_len < rows) return fail("sequence %d has %d rows but %d tokens", index, rows, seq_len);
  const int64_t num_blocks = ((int64_t)seq_len + op.kv.block_size - 1) / op.kv.block_size;
  if (num_blocks > op.block_table_width) return fail("the block table of sequence %d is too short", index);
  for (int64_t i = 0; i < num_blocks; i++) {
    const int32_t block = op.block_tables[index * (int64_t)op.block_table_width + i];
    if (block < 0 || block >= op.kv.num_blocks) return fail("sequence %d: there is no block %d", index, block);
  }
  return 0;
}

int check_attention(const HrAttention* op) {
  if (!op) return fail("attention is null");
  if (check_kv(op->kv)) return -1;
  if (op->num_heads <= 0 || op->num_heads % op->kv.num_kv_heads)
    return fail("%d heads do not share %d KV heads", op->num_heads, op->kv.num_kv_heads);
  if (!op->cu_seqlens_q || !op->seq_lens || !op->block_tables || op->num_seqs <= 0)
    return fail("there are no sequences");
  if (op->window < 0) return fail("window is %d", op->window);
  if (op->num_threads <= 0 || op->num_threads > 64) return fail("num_threads is %d", op->num_threads);
  if (op->repeats <= 0) return fail("repeats is %d", op->repeats);
  for (int i = 0; i < op->num_seqs; i++)
    if (check_sequence(*op, i)) return -1;
  const int32_t rows = op->cu_seqlens_q[op->num_seqs], width = op->num_heads * op->kv.head_dim;
  if (op->cu_seqlens_q[0] != 0) return fail("cu_seqlens_q starts with %d", op->cu_seqlens_q[0]);
  if (check_rows("q", op->q, op->q_stride, rows, width)) return -1;
  if (op->out && check_rows("out", op->out, op->out_stride, rows, width)) return -1;
  if (!op->quantized) return op->out ? 0 : fail("there is no output");
  if (op->kv.head_dim % kGroup)
    return fail("heads of %d are not quantised: no multiple of %d", op->kv.head_dim, kGroup);
  return check_quantized(op->quantized, op->quantized_bytes, rows, width, op->bits);
}

// Threads that take items until none is left, `repeats` times over, and meet in between.
class AttentionRun {
 public:
  AttentionRun(const KernelTable& table, const AttentionArgs& args, const AttentionPlan& plan, const HrAttention& op)
      : table_(table), args_(args), plan_(plan), num_threads_(op.num_threads), repeats_(op.repeats), next_(op.repeats) {
    for (std::atomic<int>& next : next_) next = 0;
    for (int i = 0; i < num_threads_; i++) {
      scratch_.emplace_back((uint8_t*)std::aligned_alloc(kAlign, attention_scratch_bytes()), std::free);
      if (!scratch_.back()) throw std::bad_alloc();
    }
  }

  void run(int64_t* nanoseconds) {
    std::vector<std::thread> threads;
    for (int i = 1; i < num_threads_; i++) threads.emplace_back([this, i] { work(i, nullptr); });
    work(0, nanoseconds);
    for (std::thread& thread : threads) thread.join();
  }

 private:
  void work(int thread, int64_t* nanoseconds) {
    AttentionArgs args = args_;
    args.scratch = scratch_[thread].get();
    for (int repeat = 0; repeat < repeats_; repeat++) {
      if (thread == 0) forget_partials();
      const int64_t start = meet(2 * repeat + 1);
      for (int i = next_[repeat]++; i < plan_.num_items; i = next_[repeat]++) table_.attention(args, i, i + 1);
      const int64_t end = meet(2 * repeat + 2);
      if (nanoseconds) nanoseconds[repeat] = end - start;
    }
  }

  // What an earlier time left must not be what a later one finds.
  void forget_partials() {
    for (int i = 0; i < plan_.num_items; i++) {
      const AttentionItem& item = plan_.items[i];
      if (item.split < 0) continue;
      const AttentionSplit& split = plan_.splits[item.split];
      const int64_t floats = attention_partial_floats(split.chunk_end - split.chunk_begin,
                                                      item.row_end - item.row_begin, args_.kv->head_dim);
      std::fill_n(plan_.partials + split.partials, floats, NAN);
    }
  }

  // Returns, to all, when the last of them came.
  int64_t meet(int times) {
    if (++arrived_ == times * num_threads_) {
      met_at_ = std::chrono::steady_clock::now().time_since_epoch() / std::chrono::nanoseconds(1);
      num_met_ = times;
    }
    for (int tries = 0; num_met_ < times; tries++)
      if (tries > 2000) std::this_thread::yield();
    return met_at_;
  }

  const KernelTable& table_;
  const AttentionArgs& args_;
  const AttentionPlan& plan_;
  const int num_threads_, repeats_;
  std::atomic<int> arrived_{0}, num_met_{0};
  std::atomic<int64_t> met_at_{0};
  std::vector<std::atomic<int>> next_;
  std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> scratch_;
};

}  // namespace

int64_t hr_kv_block_bytes(int32_t kind, int32_t num_kv_heads, int32_t head_dim, int32_t block_size) {
  if (check_kv_shape(kind, num_kv_heads, head_dim, block_size)) return -1;
  return kv_block_bytes((KvKind)kind, num_kv_heads, head_dim, block_size);
}

int hr_lanes_test(const char* isa, int32_t operation, const void* a, const void* b, const void* c, void* out,
                  int64_t num_vectors) {
  if (!a || !b || !c || !out) return fail("an array is null");
  if (operation < 0 || operation >= HR_NUM_LANE_OPERATIONS) return fail("there is no operation %d", operation);
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  table->probe_lanes(operation, a, b, c, out, num_vectors);
  return 0;
}

int hr_rms_norm_test(const char* isa, const HrRmsNorm* op) {
  if (!op) return fail("rms_norm is null");
  if (check_rows("x", op->x, op->x_stride, op->num_x_rows, op->width)) return -1;
  if (op->rows <= 0) return fail("rows is %d", op->rows);
  if (!op->weight) return fail("weight is null");
  if (op->group <= 0 || op->width % op->group) return fail("%d columns are no groups of %d", op->width, op->group);
  if (!op->row_index && op->rows > op->num_x_rows) return fail("x has %d rows, not %d", op->num_x_rows, op->rows);
  for (int i = 0; op->row_index && i < op->rows; i++)
    if (op->row_index[i] < 0 || op->row_index[i] >= op->num_x_rows) return fail("row_index[%d] is out of range", i);
  if (op->out && check_rows("out", op->out, op->out_stride, op->rows, op->width)) return -1;
  if (!op->out && !op->quantized) return fail("there is no output");
  if (op->quantized && check_quantized(op->quantized, op->quantized_bytes, op->rows, op->width, op->bits)) return -1;
  if (!op->out && op->group != op->width) return fail("a norm in groups needs out");
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  const Activations quantized = {op->quantized, op->bits, op->width};
  const RmsNormArgs args = {op->x,        op->x_stride,   op->weight,
                            op->eps,      op->width,      op->group,
                            op->out,      op->out_stride, op->quantized ? &quantized : nullptr,
                            op->row_index};
  table->rms_norm(args, 0, op->rows);
  return 0;
}

int hr_elementwise_test(const char* isa, int32_t kind, const float* a, const float* b, float* out, int64_t stride,
                        int32_t rows, int32_t width, float cap) {
  if (kind < 0 || kind >= HR_NUM_ELEMENTWISE) return fail("there is no elementwise op %d", kind);
  if (check_rows("a", a, stride, rows, width) || check_rows("out", out, stride, rows, width)) return -1;
  if (kind != HR_ELEMENTWISE_SOFT_CAP && !b) return fail("b is null");
  if (kind == HR_ELEMENTWISE_SOFT_CAP && !(cap > 0.0f)) return fail("cap is %g", (double)cap);
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  const ElementwiseArgs args = {a, b, out, stride, stride, stride, width, cap};
  void (*const ops[])(const ElementwiseArgs&, int, int) = {table->add, table->silu_gate, table->gelu_gate,
                                                           table->soft_cap};
  ops[kind](args, 0, rows);
  return 0;
}

int hr_rope_table_test(const char* isa, const float* inv_freq, int32_t half, const int32_t* positions, int32_t rows,
                       float attention_factor, float* cos_sin) {
  if (!inv_freq || !positions || !cos_sin) return fail("an array is null");
  if (half <= 0 || rows <= 0) return fail("half is %d, rows %d", half, rows);
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  table->rope_table({inv_freq, positions, attention_factor, half, cos_sin}, 0, rows);
  return 0;
}

int hr_rope_kv_test(const char* isa, const HrRopeKv* op) {
  if (check_rope_kv(op)) return -1;
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  const KvLayer kv = kv_layer(op->kv);
  const RopeKvArgs args = {op->q,        op->k,         op->v,      op->q_stride, op->k_stride,
                           op->v_stride, op->num_heads, op->q_norm, op->k_norm,   op->norm_eps,
                           op->cos_sin,  op->slots,     &kv};
  table->rope_kv(args, 0, op->rows);
  return 0;
}

int hr_attention_test(const char* isa, const HrAttention* op, int64_t* nanoseconds) {
  if (check_attention(op)) return -1;
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  try {
    const KvLayer kv = kv_layer(op->kv);
    const Activations quantized = {op->quantized, op->bits, op->num_heads * op->kv.head_dim};
    AttentionArgs args = {
        op->q,        op->q_stride,     &kv,          op->block_tables, op->block_table_width,
        op->seq_lens, op->cu_seqlens_q, op->num_seqs, op->num_heads,    op->window,
        op->scale,    op->soft_cap,     op->out,      op->out_stride,   op->quantized ? &quantized : nullptr,
        nullptr,      nullptr};
    AttentionPlan plan;
    reserve_attention_plan(plan, kv, op->num_heads, op->cu_seqlens_q[op->num_seqs], op->num_threads);
    const size_t reserved = attention_plan_capacity(plan);
    plan_attention(args, op->num_threads, plan);
    if (attention_plan_capacity(plan) != reserved) return fail("the plan took more memory than was reserved");
    args.plan = &plan;
    AttentionRun(*table, args, plan, *op).run(nanoseconds);
    for (int i = 0; i < plan.num_items; i++)
      if (plan.items[i].split >= 0 && plan.splits[plan.items[i].split].num_done)
        return fail("item %d's split is not ready for the next layer", i);
    return plan.num_items;
  } catch (const std::exception& error) {
    return fail("attention: %s", error.what());
  }
}
