// One step of a program on the pool's threads. Made and called by abi_executor.cpp.
#pragma once

#include <atomic>
#include <vector>

#include "place.h"
#include "pool.h"
#include "program.h"
#include "units.h"
#include "wait_word.h"

namespace headrace {

class Executor {
 public:
  // `program` is complete and stays where it is.
  Executor(Program& program, const KernelTable& kernels, bool is_profiled, bool has_fault);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // One step of a batch that check_batch has passed. Allocates nothing.
  void run(const HrStepBatch& batch);

  const std::vector<int64_t>& nanoseconds() const { return nanoseconds_; }

 private:
  using Range = Units::Range;

  static void help(void* self, int thread) { static_cast<Executor*>(self)->work(thread); }
  void begin_step(const HrStepBatch& batch);
  void work(int thread);
  void wait(int thread, uint32_t seen);
  void open_next(int thread);
  void run_stage(int stage, const Range& range, int thread);
  void run_op(const Op& op, const Range& range, int thread);
  int units_of(int stage) const;
  Units::Kind kind_of(int stage) const;
  void note_time(int stage);

  Program& program_;
  const KernelTable& kernels_;
  const bool is_profiled_, has_fault_;
  // A step is a list of stages: the rope tables, the ops, sampling.
  const int num_ropes_, num_stages_;
  SampleArgs sample_;
  int32_t num_tokens_ = 0, num_logits_ = 0;
  std::vector<int64_t> nanoseconds_;  // by op, then of what precedes the first, then of sampling
  int64_t last_time_ = 0;

  std::vector<Place> places_;  // by thread
  int stage_ = 0;              // that is open; read by those who hold units of it
  Units units_;
  alignas(kAlign) WaitWord changes_;                 // counts stages that opened, steps that ended, and the end
  alignas(kAlign) std::atomic<bool> is_over_{true};  // the step
  std::atomic<bool> is_stopping_{false};
  Pool pool_;  // last: its threads use all of the above
};

}  // namespace headrace
