// Self-test of what works row by row: quantisation, norms, gates, sums, the soft cap, rotation and the KV write.
#include "kv.h"
#include "selftest.h"

namespace headrace::selftest {
namespace {

constexpr int kRows = 6;

void test_quantize(Random& random, int bits) {
  const int width = 160;
  Buffer<float> x(kRows * (size_t)width);
  random.fill(x.data(), x.size());
  for (int i = 0; i < 32; i++) x[(size_t)(width + i)] = 0.0f;  // a group of zeros
  Buffer<uint8_t> out(activation_bytes(kRows, width, bits));
  compare(bits == 8 ? "quantize 8" : "quantize 16", out, [&](const KernelTable& table, uint8_t* to) {
    const Activations quantized = {to, bits, width};
    table.quantize(QuantizeArgs{x.data(), width, &quantized}, 0, kRows);
  });
}

void test_rms_norm(Random& random, int width, int group) {
  Buffer<float> x(kRows * (size_t)width), weight((size_t)group), out(kRows * (size_t)width);
  random.fill(x.data(), x.size());
  random.fill(weight.data(), weight.size());
  const int32_t row_index[kRows] = {3, 1, 2, 0, 5, 3};
  compare("rms_norm", out, [&](const KernelTable& table, float* to) {
    const RmsNormArgs args = {x.data(), width, weight.data(), 1e-5f, width, group, to, width, nullptr, row_index};
    table.rms_norm(args, 0, kRows);
  });
  if (group != width || width % kGroup) return;
  Buffer<uint8_t> narrow(activation_bytes(kRows, width, 8));
  compare("rms_norm quantised", narrow, [&](const KernelTable& table, uint8_t* to) {
    const Activations quantized = {to, 8, width};
    const RmsNormArgs args = {x.data(), width, weight.data(), 1e-5f, width, group, nullptr, 0, &quantized, nullptr};
    table.rms_norm(args, 0, kRows);
  });
}

void test_elementwise(Random& random, int width) {
  Buffer<float> a(kRows * (size_t)width), b(kRows * (size_t)width);
  random.fill(a.data(), a.size());
  random.fill(b.data(), b.size());
  for (const int op : {0, 1, 2, 3}) {
    Buffer<float> out(kRows * (size_t)width);
    const char* names[] = {"add", "silu_gate", "gelu_gate", "soft_cap"};
    compare(names[op], out, [&](const KernelTable& table, float* to) {
      const ElementwiseArgs args = {a.data(), op == 3 ? nullptr : b.data(), to, width, width, width, width, 30.0f};
      (op == 0 ? table.add : op == 1 ? table.silu_gate : op == 2 ? table.gelu_gate : table.soft_cap)(args, 0, kRows);
    });
  }
}

void test_rope_kv(Random& random, KvKind kind, int head_dim, bool has_norms) {
  const int num_heads = 4, num_kv_heads = 2, block_size = 16, num_blocks = 3;
  const size_t q_size = kRows * (size_t)(num_heads * head_dim), k_size = kRows * (size_t)(num_kv_heads * head_dim);
  const int64_t head_bytes = kv_head_bytes(kind, head_dim, block_size);
  KvLayer kv = {nullptr, num_kv_heads * head_bytes, head_bytes, kind, num_kv_heads, head_dim, block_size};
  Buffer<float> q(q_size), k(k_size), v(k_size), norm((size_t)head_dim), cos_sin(kRows * (size_t)head_dim);
  Buffer<float> inv_freq((size_t)head_dim / 2);
  for (Buffer<float>* buffer : {&q, &k, &v, &norm}) random.fill(buffer->data(), buffer->size());
  for (size_t i = 0; i < inv_freq.size(); i++) inv_freq[i] = 1.0f / (float)(1 + i * i);
  const int32_t positions[kRows] = {0, 1, 7, 100, 8191, 3}, slots[kRows] = {1, 0, 17, 47, 33, 5};
  compare("rope_table", cos_sin, [&](const KernelTable& table, float* to) {
    table.rope_table(RopeTableArgs{inv_freq.data(), positions, 1.5f, head_dim / 2, to}, 0, kRows);
  });
  // q, then k, then the blocks, so that one comparison sees all that is written.
  const size_t first = (q_size + k_size) * sizeof(float);
  Buffer<uint8_t> out(first + (size_t)(num_blocks * kv.block_bytes));
  std::memcpy(out.data(), q.data(), q.bytes());
  std::memcpy(out.data() + q.bytes(), k.data(), k.bytes());
  char what[64];
  std::snprintf(what, sizeof what, "rope_kv kind %d head_dim %d norms %d", (int)kind, head_dim, has_norms);
  compare(what, out, [&](const KernelTable& table, uint8_t* to) {
    KvLayer own = kv;
    own.data = to + first;
    const float* norms = has_norms ? norm.data() : nullptr;
    const RopeKvArgs args = {(float*)to,
                             (float*)(to + q_size * sizeof(float)),
                             v.data(),
                             num_heads * head_dim,
                             num_kv_heads * head_dim,
                             num_kv_heads * head_dim,
                             num_heads,
                             norms,
                             norms,
                             1e-6f,
                             cos_sin.data(),
                             slots,
                             &own};
    table.rope_kv(args, 0, kRows);
  });
}

}  // namespace

void test_rows(Random& random) {
  test_quantize(random, 8);
  test_quantize(random, 16);
  test_rms_norm(random, 576, 576);
  test_rms_norm(random, 45, 45);
  test_rms_norm(random, 192, 64);
  for (const int width : {1, 45, 160}) test_elementwise(random, width);
  for (const KvKind kind : {KvKind::kF32, KvKind::kF16, KvKind::kBf16, KvKind::kInt8})
    for (const int head_dim : {64, 40})
      for (const bool has_norms : {false, true}) test_rope_kv(random, kind, head_dim, has_norms);
}

}  // namespace headrace::selftest
