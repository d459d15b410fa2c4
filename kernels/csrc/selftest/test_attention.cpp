// Self-test of attention over KV blocks: every type of block, decodes beside prompts, window and soft cap.
#include "attention_plan.h"
#include "kv.h"
#include "selftest.h"

namespace headrace::selftest {
namespace {

constexpr int kHeads = 6, kKvHeads = 2, kBlockSize = 16, kBlocks = 40, kThreads = 2;
constexpr int kSeqs = 4;
const int32_t kSeqLens[kSeqs] = {1, 130, 75, 33};
const int32_t kQueryLens[kSeqs] = {1, 1, 20, 33};

void test_step(Random& random, KvKind kind, int head_dim, int window, float soft_cap) {
  const int64_t head_bytes = kv_head_bytes(kind, head_dim, kBlockSize);
  KvLayer kv = {nullptr, kKvHeads * head_bytes, head_bytes, kind, kKvHeads, head_dim, kBlockSize};
  Buffer<uint8_t> blocks((size_t)(kBlocks * kv.block_bytes));
  kv.data = blocks.data();
  // Every slot is written by the kernels' own write, so that the bytes are numbers.
  Buffer<float> k((size_t)(kKvHeads * head_dim)), v((size_t)(kKvHeads * head_dim)), unused((size_t)(kHeads * head_dim));
  for (int32_t slot = 0; slot < kBlocks * kBlockSize; slot++) {
    random.fill(k.data(), k.size());
    random.fill(v.data(), v.size());
    const RopeKvArgs args = {unused.data(), k.data(), v.data(), 0,       0,     0,  kHeads,
                             nullptr,       nullptr,  0.0f,     nullptr, &slot, &kv};
    tables()[0]->rope_kv(args, 0, 1);
  }
  const int width = kHeads * head_dim, table_width = 9;
  int32_t cu_seqlens_q[kSeqs + 1] = {0}, block_tables[kSeqs * table_width];
  for (int s = 0; s < kSeqs; s++) cu_seqlens_q[s + 1] = cu_seqlens_q[s] + kQueryLens[s];
  for (int32_t& block : block_tables) block = 1 + random.below(kBlocks - 1);
  const int num_rows = cu_seqlens_q[kSeqs];
  Buffer<float> q((size_t)(num_rows * width)), out((size_t)(num_rows * width));
  random.fill(q.data(), q.size());
  Buffer<uint8_t> scratch(attention_scratch_bytes());
  AttentionArgs args = {};
  args.q = q.data();
  args.q_stride = args.out_stride = width;
  args.kv = &kv;
  args.block_tables = block_tables;
  args.block_table_width = table_width;
  args.seq_lens = kSeqLens;
  args.cu_seqlens_q = cu_seqlens_q;
  args.num_seqs = kSeqs;
  args.num_heads = kHeads;
  args.window = window;
  args.scale = 0.125f;
  args.soft_cap = soft_cap;
  args.scratch = scratch.data();
  AttentionPlan plan;
  reserve_attention_plan(plan, kv, kHeads, num_rows, kThreads);
  plan_attention(args, kThreads, plan);
  args.plan = &plan;
  char what[80];
  std::snprintf(what, sizeof what, "attention kind %d head_dim %d window %d cap %g", (int)kind, head_dim, window,
                (double)soft_cap);
  compare(what, out, [&](const KernelTable& table, float* to) {
    AttentionArgs own = args;
    own.out = to;
    table.attention(own, 0, plan.num_items);
  });
  if (width % kGroup) return;
  Buffer<uint8_t> narrow(activation_bytes(num_rows, width, 8));
  compare(what, narrow, [&](const KernelTable& table, uint8_t* to) {
    const Activations quantized = {to, 8, width};
    AttentionArgs own = args;
    own.quantized = &quantized;
    table.attention(own, 0, plan.num_items);
  });
}

}  // namespace

void test_attention(Random& random) {
  for (const KvKind kind : {KvKind::kF32, KvKind::kF16, KvKind::kBf16, KvKind::kInt8})
    for (const int head_dim : {64, 40}) {
      test_step(random, kind, head_dim, 0, 0.0f);
      test_step(random, kind, head_dim, 24, 30.0f);
    }
}

}  // namespace headrace::selftest
