// The step: all threads walk the op list together. An op is cut into units, threads take ranges of them from a counter,
// and meet at a barrier before the next op. What a unit computes depends on nothing but the unit, so neither the number
// of threads nor who was quicker can be seen in the result.
#include "executor.h"

#include <chrono>
#include <cstring>

namespace headrace {
namespace {

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The planted fault (HrExecutorConfig::test_fault): a dense product whose sum is split in two where there is more than
// one row. Every result is right to rounding, and the bits depend on the neighbours.
bool is_splittable(const LinearArgs& args) {
  return args.x && args.weight->kind == WeightKind::kF32 && args.epilogue == Epilogue::kStore && !args.bias &&
         args.num_rows > 1 && args.weight->cols % 32 == 0;
}

void run_split(const KernelTable& kernels, const LinearArgs& args, int begin, int end) {
  PackedMatrix half = *args.weight;
  half.cols /= 2;
  LinearArgs part = args;
  part.weight = &half;
  kernels.linear(part, begin, end);
  half.data += (int64_t)half.cols * kLanes * (int64_t)sizeof(float);
  part.x += half.cols;
  part.epilogue = Epilogue::kAdd;
  kernels.linear(part, begin, end);
}

void copy_rows(const ElementwiseArgs& args, const int32_t* row_index, int begin, int end) {
  for (int row = begin; row < end; row++)
    std::memcpy(args.out + row * args.out_stride, args.a + row_index[row] * args.a_stride,
                (size_t)args.width * sizeof(float));
}

}  // namespace

Executor::Executor(Program& program, const KernelTable& kernels, bool is_profiled, bool has_fault)
    : program_(program),
      kernels_(kernels),
      pool_(program.num_threads),
      counters_(program.ops.size() + program.ropes.size() + 1),
      is_profiled_(is_profiled),
      has_fault_(has_fault),
      sample_(),
      nanoseconds_(program.ops.size() + 2, 0) {}

void Executor::run(const HrStepBatch& batch) {
  if (is_profiled_) last_time_ = now();
  begin_step(batch);
  pool_.run(work_on, this);
}

// Row counts and pointers of this step, in every op.
void Executor::begin_step(const HrStepBatch& batch) {
  num_tokens_ = batch.num_tokens;
  num_logits_ = batch.num_logits;
  std::memcpy(program_.row_index, batch.logit_rows, (size_t)num_logits_ * sizeof(int32_t));
  for (Rope& rope : program_.ropes) rope.args.positions = batch.positions;
  for (auto& plan : program_.plans) {
    plan->shapes.num_seqs = batch.num_seqs;
    plan->shapes.seq_lens = batch.seq_lens;
    plan->shapes.cu_seqlens_q = batch.cu_seqlens_q;
    plan_attention(plan->shapes, pool_.num_threads(), plan->plan);
  }
  for (Op& op : program_.ops) {
    if (op.kind == HR_EMBED) op.embed.token_ids = batch.token_ids;
    if (op.kind == HR_LINEAR) op.linear.num_rows = op.is_logits ? num_logits_ : num_tokens_;
    if (op.kind == HR_ROPE_KV) op.rope_kv.slots = batch.slot_mapping;
    if (op.kind == HR_ATTENTION) {
      op.attention.block_tables = batch.block_tables;
      op.attention.block_table_width = batch.block_table_width;
      op.attention.seq_lens = batch.seq_lens;
      op.attention.cu_seqlens_q = batch.cu_seqlens_q;
      op.attention.num_seqs = batch.num_seqs;
    }
  }
  sample_ = {program_.logits.data, program_.logits.stride, program_.vocab_size, batch.samplings,    batch.sampling_ids,
             batch.bias_values,    batch.results,          batch.top_ids,       batch.top_logprobs, nullptr};
  for (Counter& counter : counters_) counter.taken.store(0, std::memory_order_relaxed);
}

void Executor::work(int thread) {
  if (thread == 0) note_time((int)program_.ops.size());
  run_rope_tables();  // read behind the barrier of the first op, which embeds
  for (size_t i = 0; i < program_.ops.size(); i++) {
    const Op& op = program_.ops[i];
    const int units = units_of(op);
    if (units == 0) continue;
    run_op(op, units, thread, counters_[i]);
    pool_.barrier(thread);
    if (thread == 0) note_time((int)i);
  }
  if (!sample_.rows || num_logits_ == 0) return;
  run_sampling(thread);
  if (!is_profiled_) return;
  pool_.barrier(thread);
  if (thread == 0) note_time((int)program_.ops.size() + 1);
}

void Executor::run_rope_tables() {
  Range range;
  for (size_t i = 0; i < program_.ropes.size(); i++)
    while (take(counters_[program_.ops.size() + i], num_tokens_, 4, range))
      kernels_.rope_table(program_.ropes[i].args, range.begin, range.end);
}

void Executor::run_sampling(int thread) {
  SampleArgs args = sample_;
  args.scratch = program_.sample_scratch[thread];
  Range range;
  while (take(counters_.back(), num_logits_, 1, range)) kernels_.sample(args, range.begin, range.end);
}

int Executor::units_of(const Op& op) const {
  const int rows = op.is_logits ? num_logits_ : num_tokens_;
  if (op.kind == HR_LINEAR) return rows ? op.units : 0;
  if (op.kind == HR_ATTENTION) return program_.plans[op.plan]->plan.num_items;
  return rows;
}

void Executor::run_op(const Op& op, int units, int thread, Counter& counter) {
  Range r;
  // Four rows of quantised activations share cache lines.
  const int grain = op.kind == HR_NORM || op.kind == HR_QUANTIZE ? kColumns : 1;
  if (op.kind == HR_ATTENTION) {
    AttentionArgs args = op.attention;
    args.scratch = program_.attention_scratch[thread];
    while (take(counter, units, grain, r)) kernels_.attention(args, r.begin, r.end);
    return;
  }
  while (take(counter, units, grain, r)) {
    switch (op.kind) {
      case HR_EMBED:
        kernels_.embed(op.embed, r.begin, r.end);
        break;
      case HR_QUANTIZE:
        kernels_.quantize(op.quantize, r.begin, r.end);
        break;
      case HR_LINEAR:
        if (has_fault_ && is_splittable(op.linear))
          run_split(kernels_, op.linear, r.begin, r.end);
        else
          kernels_.linear(op.linear, r.begin, r.end);
        break;
      case HR_NORM:
        kernels_.rms_norm(op.norm, r.begin, r.end);
        break;
      case HR_ROPE_KV:
        kernels_.rope_kv(op.rope_kv, r.begin, r.end);
        break;
      case HR_ADD:
        kernels_.add(op.elementwise, r.begin, r.end);
        break;
      case HR_SILU_GATE:
        kernels_.silu_gate(op.elementwise, r.begin, r.end);
        break;
      case HR_GELU_GATE:
        kernels_.gelu_gate(op.elementwise, r.begin, r.end);
        break;
      case HR_SELECT:
        copy_rows(op.elementwise, program_.row_index, r.begin, r.end);
        break;
      case HR_SOFT_CAP:
        kernels_.soft_cap(op.elementwise, r.begin, r.end);
        break;
      default:
        break;
    }
  }
}

// The next units, a multiple of `grain`: a share of what is left, so that ranges are long at first, for streaming, and
// short at the end, for balance beside a busy core.
bool Executor::take(Counter& counter, int units, int grain, Range& range) const {
  const int shares = 2 * pool_.num_threads();
  int begin = counter.taken.load(std::memory_order_relaxed);
  for (;;) {
    if (begin >= units) return false;
    int size = (units - begin) / shares / grain * grain;
    if (size < grain) size = grain;
    const int end = units - begin <= size ? units : begin + size;
    if (counter.taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
      range = {begin, end};
      return true;
    }
  }
}

void Executor::note_time(int slot) {
  if (!is_profiled_) return;
  const int64_t time = now();
  nanoseconds_[slot] += time - last_time_;
  last_time_ = time;
}

}  // namespace headrace
