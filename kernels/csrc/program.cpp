// From an HrExecutorConfig to a Program: checks, memory, resolved pointers. Called once, by hr_executor_create.
#include "program.h"

#include <sys/mman.h>

#include <cstring>
#include <string>

#include "abi_linear.h"
#include "error.h"
#include "kv.h"
#include "program_ops.h"
#include "units.h"

namespace headrace {
namespace {

constexpr int64_t kMostBytes = (int64_t)1 << 46;  // beyond what any machine maps; sums of sizes stay far from overflow
constexpr size_t kHugePage = (size_t)2 << 20;
constexpr int32_t kMostRows = 1 << 24;
constexpr int32_t kMostWidth = 1 << 25;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// a * b, or kMostBytes where that is more.
int64_t product(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_mul_overflow(a, b, &result) || result > kMostBytes ? kMostBytes : result;
}

bool is_between(int64_t value, int64_t lowest, int64_t highest) { return value >= lowest && value <= highest; }

int check_limits(const HrExecutorConfig& c) {
  if (!is_between(c.max_tokens, 1, kMostRows)) return fail("max_tokens %d is out of range", c.max_tokens);
  if (!is_between(c.max_logit_rows, 1, kMostRows)) return fail("max_logit_rows %d is out of range", c.max_logit_rows);
  if (!is_between(c.num_threads, 1, 1024)) return fail("%d threads are out of range", c.num_threads);
  if (!is_between(c.vocab_size, 1, kMostWidth)) return fail("a vocabulary of %d is out of range", c.vocab_size);
  if (!is_between(c.block_size, 1, 1 << 16)) return fail("blocks of %d tokens are out of range", c.block_size);
  if (!is_between(c.num_blocks, 1, INT32_MAX / c.block_size)) return fail("%d blocks are out of range", c.num_blocks);
  if (!is_between(c.kv_kind, 0, 3)) return fail("KV kind %d is unknown", c.kv_kind);
  const int32_t counts[] = {c.num_matrices, c.num_vectors, c.num_buffers, c.num_operands,
                            c.num_ropes,    c.num_layers,  c.num_ops};
  for (int32_t count : counts)
    if (!is_between(count, 0, 1 << 20)) return fail("a count of %d is out of range", count);
  return 0;
}

int add_matrix(const HrMatrix& m, int index, Program& program) {
  if (check_data(&m)) {
    const std::string sentence = hr_last_error();
    return fail("matrix %d: %s", index, sentence.c_str());
  }
  if (m.rows > kMostWidth || m.cols > kMostWidth)
    return fail("matrix %d: %d x %d is out of range", index, m.rows, m.cols);
  program.matrices.push_back(packed_matrix(m));
  return 0;
}

// All matrices side by side in huge pages, which one row's products stream 8 % faster than pages of 4 KiB (decode of
// SmolLM2 Q4_1, Zen 5: 3.37 to 3.07 ms). A file mapped into memory has none, so what it holds is copied.
int copy_matrices(const HrExecutorConfig& c, Program& program) {
  int64_t total = 0;
  for (const PackedMatrix& m : program.matrices) {
    total += round_up(product(num_panels(m), m.panel_bytes), kAlign);
    if (total >= kMostBytes) return fail("the weights are too large");
  }
  if (total && !program.weights.map_huge((size_t)total)) return fail("no memory for %ld bytes of weights", (long)total);
  uint8_t* to = program.weights.data();
  for (int i = 0; i < c.num_matrices; i++) {
    PackedMatrix& m = program.matrices[(size_t)i];
    const int64_t bytes = num_panels(m) * m.panel_bytes;
    std::memcpy(to, m.data, (size_t)bytes);
    m.data = to;
    to += round_up(bytes, kAlign);
  }
  return 0;
}

// Copied to where whole F32x16 can be read.
int add_vectors(const HrExecutorConfig& c, Program& program) {
  int64_t total = 0;
  for (int i = 0; i < c.num_vectors; i++) {
    const HrVector& v = c.vectors[i];
    if (!v.data || !is_between(v.size, 1, kMostWidth)) return fail("vector %d: %ld elements", i, (long)v.size);
    total += round_up(v.size, kLanes);
  }
  if (total && !program.vector_memory.map((size_t)total * sizeof(float))) return fail("no memory for the vectors");
  float* to = (float*)program.vector_memory.data();
  for (int i = 0; i < c.num_vectors; i++) {
    const HrVector& v = c.vectors[i];
    std::memcpy(to, v.data, (size_t)v.size * sizeof(float));
    program.vectors.push_back(to);
    program.vector_sizes.push_back(v.size);
    to += round_up(v.size, kLanes);
  }
  return 0;
}

// Cuts the arena: the first pass counts bytes, the second hands out addresses.
class Cutter {
 public:
  explicit Cutter(uint8_t* base) : base_(base) {}
  uint8_t* take(int64_t bytes) {
    uint8_t* here = base_ ? base_ + offset_ : nullptr;
    offset_ += round_up(bytes, kAlign);
    if (offset_ > kMostBytes) offset_ = kMostBytes;
    return here;
  }
  int64_t bytes() const { return offset_; }

 private:
  uint8_t* base_;
  int64_t offset_ = 0;
};

// Floats between rows of a float32 buffer. Not a multiple of 4 KiB: a panel's outputs for 64 rows of logits would
// compete for the same set of both caches (the head of 49,152 outputs then takes 4 % longer with AVX2, 8 % with VNNI).
int64_t row_stride(int32_t width) {
  const int64_t stride = round_up(width, kLanes);
  return stride % 1024 ? stride : stride + kLanes;
}

void cut_arena(const HrExecutorConfig& c, Program& program, Cutter& cutter) {
  std::vector<float*> floats(c.num_buffers, nullptr);
  for (int i = 0; i < c.num_buffers; i++) {
    const HrBuffer& buffer = c.buffers[i];
    const int64_t rows = round_up(buffer.is_logits ? c.max_logit_rows : c.max_tokens, kColumns);
    if (buffer.bits) {
      const int64_t groups = product(rows / kColumns, buffer.width / kGroup);
      uint8_t* data = cutter.take(product(groups, (int64_t)activation_block_bytes(buffer.bits)));
      program.activations[i] = {data, buffer.bits, buffer.width};
    } else {
      floats[i] = (float*)cutter.take(product(rows, row_stride(buffer.width) * 4));
    }
  }
  for (int i = 0; i < c.num_operands; i++) {
    const HrOperand& operand = c.operands[i];
    const HrBuffer& buffer = c.buffers[operand.buffer];
    if (buffer.bits) continue;
    float* data = floats[operand.buffer];
    const int64_t stride = row_stride(buffer.width);
    program.operands[i] = {data ? data + operand.column : nullptr, stride, operand.width, buffer.is_logits != 0};
  }
  for (Rope& rope : program.ropes) rope.args.cos_sin = (float*)cutter.take(product(c.max_tokens, rope.args.half * 8));
  program.row_index = (int32_t*)cutter.take((int64_t)c.max_logit_rows * 4);
  for (int thread = 0; thread < c.num_threads; thread++) {
    program.attention_scratch[thread] = cutter.take((int64_t)attention_scratch_bytes());
    program.sample_scratch[thread] = cutter.take((int64_t)sample_scratch_bytes(c.vocab_size));
  }
}

int check_buffers(const HrExecutorConfig& c) {
  for (int i = 0; i < c.num_buffers; i++) {
    const HrBuffer& b = c.buffers[i];
    if (b.bits != 0 && b.bits != 8 && b.bits != 16) return fail("buffer %d: %d bits", i, b.bits);
    if (!is_between(b.width, 1, kMostWidth)) return fail("buffer %d: width %d is out of range", i, b.width);
    if (b.bits && b.width % kGroup) return fail("buffer %d: width %d is no multiple of %d", i, b.width, kGroup);
  }
  for (int i = 0; i < c.num_operands; i++) {
    const HrOperand& o = c.operands[i];
    if (!is_between(o.buffer, 0, c.num_buffers - 1)) return fail("operand %d: no such buffer", i);
    const HrBuffer& b = c.buffers[o.buffer];
    if (!is_between(o.column, 0, b.width - 1) || o.column % kLanes || !is_between(o.width, 1, b.width - o.column))
      return fail("operand %d: columns %d + %d of %d", i, o.column, o.width, b.width);
    if (b.bits && (o.column || o.width != b.width)) return fail("operand %d: a part of a quantised buffer", i);
  }
  return 0;
}

int add_buffers(const HrExecutorConfig& c, Program& program) {
  if (check_buffers(c)) return -1;
  program.activations.resize(c.num_buffers);
  program.operands.resize(c.num_operands);
  program.attention_scratch.resize(c.num_threads);
  program.sample_scratch.resize(c.num_threads);
  for (int i = 0; i < c.num_operands; i++) {
    const int32_t buffer = c.operands[i].buffer;
    program.quant_buffer.push_back(c.buffers[buffer].bits ? buffer : -1);
  }
  for (int i = 0; i < c.num_ropes; i++) {
    const HrRope& rope = c.ropes[i];
    if (!rope.inv_freq || !is_between(rope.half, 1, kMaxHeadDim / 2)) return fail("rope %d: half %d", i, rope.half);
    program.ropes.push_back({std::vector<float>(rope.inv_freq, rope.inv_freq + rope.half), RopeTableArgs()});
    program.ropes[i].args = {nullptr, nullptr, rope.attention_factor, rope.half, nullptr};
  }
  for (Rope& rope : program.ropes) rope.args.inv_freq = rope.inv_freq.data();
  Cutter counter(nullptr);
  cut_arena(c, program, counter);
  if (counter.bytes() >= kMostBytes || !program.arena.map((size_t)counter.bytes()))
    return fail("no memory for %ld bytes of activations", (long)counter.bytes());
  Cutter cutter(program.arena.data());
  cut_arena(c, program, cutter);
  return 0;
}

int add_layers(const HrExecutorConfig& c, Program& program) {
  int64_t total = 0;
  for (int i = 0; i < c.num_layers; i++) {
    const HrKvShape& shape = c.layers[i];
    if (!is_between(shape.head_dim, 1, kMaxHeadDim) || !is_between(shape.num_kv_heads, 1, 1 << 16))
      return fail("layer %d: %d KV heads of %d", i, shape.num_kv_heads, shape.head_dim);
    const KvKind kind = (KvKind)c.kv_kind;
    const int64_t head = kv_head_bytes(kind, shape.head_dim, c.block_size);
    const int64_t block = kv_block_bytes(kind, shape.num_kv_heads, shape.head_dim, c.block_size);
    program.layers.push_back({nullptr, block, head, kind, shape.num_kv_heads, shape.head_dim, c.block_size});
    total += product(block, c.num_blocks);
    if (total >= kMostBytes) return fail("%d KV blocks are too many", c.num_blocks);
    // Twice: an attention's items, some of which are split.
    if (2 * product(c.max_tokens, shape.num_kv_heads) > Units::kMost)
      return fail("%d tokens with %d KV heads are too many for a step", c.max_tokens, shape.num_kv_heads);
  }
  if (total && !program.kv.map((size_t)total)) return fail("no memory for %ld bytes of KV blocks", (long)total);
  uint8_t* data = program.kv.data();
  for (KvLayer& layer : program.layers) {
    layer.data = data;
    data += layer.block_bytes * c.num_blocks;
  }
  return 0;
}

}  // namespace

Memory::~Memory() {
  if (mapped_) munmap(mapped_, bytes_);
}

bool Memory::map(size_t bytes) {
  void* mapped = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return false;
  mapped_ = mapped;
  data_ = (uint8_t*)mapped;
  bytes_ = bytes;
  return true;
}

bool Memory::map_huge(size_t bytes) {
  if (!map(bytes + kHugePage)) return false;
  data_ += -(uintptr_t)data_ % kHugePage;
#ifdef MADV_HUGEPAGE
  madvise(data_, bytes, MADV_HUGEPAGE);  // refused where the system has none: then these are pages like others
#endif
  return true;
}

int build_program(const HrExecutorConfig& c, Program& program) {
  if (check_limits(c)) return -1;
  program.vocab_size = c.vocab_size;
  program.num_blocks = c.num_blocks;
  program.block_size = c.block_size;
  program.max_tokens = c.max_tokens;
  program.max_logit_rows = c.max_logit_rows;
  program.num_threads = c.num_threads;
  for (int i = 0; i < c.num_matrices; i++)
    if (add_matrix(c.matrices[i], i, program)) return -1;
  if (copy_matrices(c, program) || add_vectors(c, program) || add_layers(c, program) || add_buffers(c, program))
    return -1;
  return resolve_ops(c, program);
}

}  // namespace headrace
