// One step of a program on the pool's threads. Made and called by executor_abi.cpp.
#pragma once

#include <atomic>
#include <vector>

#include "pool.h"
#include "program.h"

namespace headrace {

class Executor {
 public:
  // `program` is complete and stays where it is.
  Executor(Program& program, const KernelTable& kernels, bool is_profiled, bool has_fault);

  // One step of a batch that check_batch has passed. Allocates nothing.
  void run(const HrStepBatch& batch);

  const std::vector<int64_t>& nanoseconds() const { return nanoseconds_; }

 private:
  // Units of an op that nobody has taken yet; on a cache line of its own.
  struct alignas(kAlign) Counter {
    std::atomic<int32_t> taken;
  };
  struct Range {
    int begin, end;
  };

  static void work_on(void* self, int thread) { static_cast<Executor*>(self)->work(thread); }
  void begin_step(const HrStepBatch& batch);
  void work(int thread);
  void run_rope_tables();
  void run_op(const Op& op, int units, int thread, Counter& counter);
  void run_sampling(int thread);
  int units_of(const Op& op) const;
  bool take(Counter& counter, int units, int grain, Range& range) const;
  void note_time(int slot);

  Program& program_;
  const KernelTable& kernels_;
  Pool pool_;
  std::vector<Counter> counters_;  // by op, then by rope table, then of sampling
  const bool is_profiled_, has_fault_;
  SampleArgs sample_;
  int32_t num_tokens_ = 0, num_logits_ = 0;
  std::vector<int64_t> nanoseconds_;  // by op, then of what precedes the first, then of sampling
  int64_t last_time_ = 0;
};

}  // namespace headrace
