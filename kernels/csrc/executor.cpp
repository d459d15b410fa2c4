// The step: a list of stages, each cut into units that the threads share out (units.h). What a unit computes depends on
// nothing but the unit, so neither the number of threads nor who was quicker can be seen in the result.
//
// The caller opens the first stage and works; helpers join in as they wake up. Whoever finishes a stage opens the next,
// and does stages that are not worth sharing (a norm of one row) itself: a decode step of one row hands over 5 times a
// layer instead of 8.
#include "executor.h"

#include <chrono>
#include <cstring>

namespace headrace {
namespace {

// Then a thread that finds no units sleeps: long enough for most stages, short enough to leave the core to a thread
// that holds units and was pushed off its own.
constexpr int64_t kSpin = 50'000;  // ns
// For so long it looks at another thread's clock, to see whether that runs.
constexpr int64_t kLook = 10'000;  // ns

constexpr int kTileRows = 64;

int num_row_tiles(int rows) { return (rows + kTileRows - 1) / kTileRows; }

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// The planted fault (HrExecutorConfig::test_fault): a dense product whose sum is split in two where there is more than
// one row, up to a tile. Every result is right to rounding, and the bits depend on the neighbours.
bool is_splittable(const LinearArgs& args) {
  return args.x && args.weight->kind == WeightKind::kF32 && args.epilogue == Epilogue::kStore && !args.bias &&
         args.num_rows > 1 && args.num_rows <= kTileRows && args.weight->cols % 32 == 0;
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

// Rows [begin, end) of a product as a product of its own; begin is a multiple of kColumns.
struct LinearRows {
  LinearArgs args;
  Activations activations, gated;

  LinearRows(const LinearArgs& all, int begin, int end) : args(all), activations(), gated() {
    args.num_rows = end - begin;
    if (all.x) args.x += begin * all.x_stride;
    if (all.out) args.out += begin * all.out_stride;
    if (all.activations) args.activations = shifted(activations, *all.activations, begin);
    if (all.gated) args.gated = shifted(gated, *all.gated, begin);
  }
  LinearRows(const LinearRows&) = delete;

  static const Activations* shifted(Activations& to, const Activations& from, int row) {
    to = from;
    to.data += activation_bytes(row, from.width, from.bits);
    return &to;
  }
};

// Units of a product are panels, cut into tiles of kTileRows rows where there are more: the last panels of a prefill
// are then shared out as well. Whole panels go to the kernel in one call.
void run_tiles(const KernelTable& kernels, const LinearArgs& args, int begin, int end) {
  const int tiles = num_row_tiles(args.num_rows);
  while (begin < end) {
    const int panel = begin / tiles, first = begin % tiles;
    if (first == 0 && end - begin >= tiles) {
      const int panels = (end - begin) / tiles;
      kernels.linear(args, panel, panel + panels);
      begin += panels * tiles;
      continue;
    }
    const int last = tiles - first < end - begin ? tiles : first + end - begin;
    const int rows = last * kTileRows < args.num_rows ? last * kTileRows : args.num_rows;
    kernels.linear(LinearRows(args, first * kTileRows, rows).args, panel, panel + 1);
    begin += last - first;
  }
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
      is_profiled_(is_profiled),
      has_fault_(has_fault),
      num_ropes_((int)program.ropes.size()),
      num_stages_((int)(program.ropes.size() + program.ops.size()) + 1),
      sample_(),
      nanoseconds_(program.ops.size() + 2, 0),
      places_((size_t)program.num_threads),
      pool_(program.num_threads) {
  pool_.begin(help, this);
}

Executor::~Executor() {
  is_stopping_.store(true, std::memory_order_release);
  changes_.advance();
  pool_.end();
}

void Executor::run(const HrStepBatch& batch) {
  if (is_profiled_) last_time_ = now();
  begin_step(batch);
  is_over_.store(false, std::memory_order_relaxed);
  stage_ = -1;
  open_next(0);
  work(0);
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
}

// Until the step is over, for the caller; until the executor is destroyed, for its helpers.
void Executor::work(int thread) {
  Place& place = places_[(size_t)thread];
  place.take();
  Range range;
  for (;;) {
    const uint32_t seen = changes_.load();
    if (thread == 0 ? is_over_.load(std::memory_order_acquire) : is_stopping_.load(std::memory_order_acquire)) return;
    if (units_.take(program_.num_threads, range)) {
      place.set_busy(true);
      run_stage(stage_, range, thread);
      if (units_.finish(range)) open_next(thread);
      place.set_busy(false);
    } else {
      wait(thread, seen);
    }
  }
}

// Until something changes. Who has spun in vain changes places with a thread that holds units but does not run.
void Executor::wait(int thread, uint32_t seen) {
  if (changes_.spin(seen, kSpin, false)) return;
  for (int other = 0; other < program_.num_threads; other++) {
    Place& place = places_[(size_t)other];
    if (other == thread || !place.is_busy()) continue;
    const int64_t before = place.nanoseconds();
    if (changes_.spin(seen, kLook, false)) return;
    if (before < 0 || place.nanoseconds() - before > kLook / 4) continue;
    place.swap();
    break;
  }
  changes_.sleep(seen);
}

// Called by the one thread that has finished the stage before: the next one that has units, or the end of the step.
void Executor::open_next(int thread) {
  for (;;) {
    note_time(stage_);
    stage_++;
    if (stage_ == num_stages_) break;
    const int units = units_of(stage_);
    const Units::Kind kind = kind_of(stage_);
    if (units > (kind == Units::kCoarse ? kColumns : 1)) {
      units_.open(units, kind);
      changes_.advance();
      return;
    }
    if (units) run_stage(stage_, {0, units, units}, thread);
  }
  is_over_.store(true, std::memory_order_release);
  changes_.advance();
}

int Executor::units_of(int stage) const {
  if (stage < num_ropes_) return num_tokens_;
  if (stage == num_stages_ - 1) return sample_.rows ? num_logits_ : 0;
  const Op& op = program_.ops[(size_t)(stage - num_ropes_)];
  const int rows = op.is_logits ? num_logits_ : num_tokens_;
  if (op.kind == HR_LINEAR) return op.units * num_row_tiles(rows);
  if (op.kind == HR_ATTENTION) return program_.plans[(size_t)op.plan]->plan.num_items;
  return rows;
}

// Coarse are stages whose units are rows and cheap: four rows of quantised activations share cache lines. Attention's
// items, the largest first, can be uneven: queries late in a prompt see more keys than early ones, and in a share per
// thread one thread got three quarters of the work. Even ones stay in long ranges, in which each item fetches the next.
Units::Kind Executor::kind_of(int stage) const {
  if (stage < num_ropes_) return Units::kCoarse;
  if (stage == num_stages_ - 1) return Units::kEven;
  const Op& op = program_.ops[(size_t)(stage - num_ropes_)];
  switch (op.kind) {
    case HR_ATTENTION: {
      const AttentionPlan& plan = program_.plans[(size_t)op.plan]->plan;
      return 8 * (int64_t)plan.items[0].work > 9 * (int64_t)plan.items[plan.num_items / 2].work ? Units::kUneven
                                                                                                : Units::kEven;
    }
    case HR_LINEAR:
    case HR_ROPE_KV:
    case HR_SOFT_CAP:
      return Units::kEven;
    default:
      return Units::kCoarse;
  }
}

void Executor::run_stage(int stage, const Range& range, int thread) {
  if (stage < num_ropes_) {
    kernels_.rope_table(program_.ropes[(size_t)stage].args, range.begin, range.end);
  } else if (stage == num_stages_ - 1) {
    SampleArgs args = sample_;
    args.scratch = program_.sample_scratch[(size_t)thread];
    kernels_.sample(args, range.begin, range.end);
  } else {
    run_op(program_.ops[(size_t)(stage - num_ropes_)], range, thread);
  }
}

void Executor::run_op(const Op& op, const Range& r, int thread) {
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
        run_tiles(kernels_, op.linear, r.begin, r.end);
      break;
    case HR_NORM:
      kernels_.rms_norm(op.norm, r.begin, r.end);
      break;
    case HR_ROPE_KV:
      kernels_.rope_kv(op.rope_kv, r.begin, r.end);
      break;
    case HR_ATTENTION: {
      AttentionArgs args = op.attention;
      args.scratch = program_.attention_scratch[(size_t)thread];
      kernels_.attention(args, r.begin, r.end);
      break;
    }
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
    case HR_NUM_OP_KINDS:
      break;
  }
}

// What has passed since the last note belongs to `stage`; before the first stage, and to rope tables, as "what
// precedes".
void Executor::note_time(int stage) {
  if (!is_profiled_) return;
  const int64_t time = now();
  const int num_ops = (int)program_.ops.size();
  const int slot = stage < num_ropes_ ? num_ops : stage == num_stages_ - 1 ? num_ops + 1 : stage - num_ropes_;
  nanoseconds_[(size_t)slot] += time - last_time_;
  last_time_ = time;
}

}  // namespace headrace
