// The pool of threads behind the C ABI, for its tests and for bench/ops/pool.py. The executor has a pool of its own.
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <vector>

#include "error.h"
#include "headrace_native.h"
#include "pool.h"
#include "units.h"
#include "wait_word.h"

using namespace headrace;

struct HrPool {
  HrPool(int num_threads, const PoolOptions& options) : threads(num_threads, options) {}
  Pool threads;
};

namespace {

constexpr int kLine = 128 / sizeof(int64_t);

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Each thread counts, and looks behind each barrier whether all others have counted as far. Nothing here is atomic:
// what a barrier does not order is a data race, which the thread sanitizer reports.
struct BarrierTest {
  Pool* pool;
  int barriers;
  std::vector<int64_t> counts;  // by thread, a line each
  std::vector<int64_t> wrong;

  static void work(void* self, int thread) { static_cast<BarrierTest*>(self)->work(thread); }

  void work(int thread) {
    for (int i = 0; i < barriers; i++) {
      counts[(size_t)(thread * kLine)]++;
      pool->barrier(thread);
      for (int other = 0; other < pool->num_threads(); other++)
        wrong[(size_t)(thread * kLine)] += counts[(size_t)(other * kLine)] != counts[(size_t)(thread * kLine)];
      pool->barrier(thread);  // nobody counts on while another still looks
    }
  }
};

// A step as the executor does it: phases of units that threads share out. With `meets` in the plain form, a barrier
// after each phase; else whoever finishes a phase opens the next, and nobody is waited for who holds no units
// (units.h).
class SyntheticSteps {
 public:
  SyntheticSteps(Pool& pool, const HrPoolSteps& steps)
      : pool_(pool), steps_(steps), taken_((size_t)steps.phases), results_((size_t)(pool.num_threads() * kLine)) {
    if (steps.streams) memory_.assign((size_t)steps.memory_bytes / sizeof(uint64_t), 1);
  }

  void run(int64_t* nanoseconds) {
    if (!steps_.meets) pool_.begin(share_all, this);
    for (int i = 0; i < steps_.steps; i++) {
      for (const int64_t end = now() + steps_.gap_ns; now() < end;) {
      }
      const int64_t start = now();
      step();
      nanoseconds[i] = now() - start;
    }
    if (steps_.meets) return;
    is_stopping_.store(true, std::memory_order_release);
    changes_.advance();
    pool_.end();
  }

 private:
  struct alignas(128) Counter {
    std::atomic<int> value{0};
  };

  static void meet_all(void* self, int thread) { static_cast<SyntheticSteps*>(self)->meet_all(thread); }
  static void share_all(void* self, int thread) { static_cast<SyntheticSteps*>(self)->share_all(thread); }

  void step() {
    if (steps_.meets) {
      for (Counter& counter : taken_) counter.value.store(0, std::memory_order_relaxed);
      pool_.run(meet_all, this);
      return;
    }
    phase_ = 0;
    is_over_.store(false, std::memory_order_relaxed);
    units_.open(steps_.units, Units::kEven);
    changes_.advance();
    share_all(0);
  }

  void meet_all(int thread) {
    for (int phase = 0; phase < steps_.phases; phase++) {
      std::atomic<int>& taken = taken_[(size_t)phase].value;
      for (int begin = taken.load(std::memory_order_relaxed); begin < steps_.units;) {
        const int share = (steps_.units - begin) / (2 * pool_.num_threads()), size = share > 1 ? share : 1;
        if (!taken.compare_exchange_weak(begin, begin + size, std::memory_order_relaxed)) continue;
        work(phase, begin, begin + size, thread);
        begin = taken.load(std::memory_order_relaxed);
      }
      pool_.barrier(thread);
    }
  }

  void share_all(int thread) {
    Units::Range range;
    for (;;) {
      const uint32_t seen = changes_.load();
      const std::atomic<bool>& is_over = thread == 0 ? is_over_ : is_stopping_;
      if (is_over.load(std::memory_order_acquire)) return;
      if (!units_.take(2 * pool_.num_threads(), range)) {
        changes_.wait(seen, steps_.spin_ns, steps_.yields != 0);
        continue;
      }
      work(phase_, range.begin, range.end, thread);
      if (!units_.finish(range)) continue;
      if (++phase_ < steps_.phases)
        units_.open(steps_.units, Units::kEven);
      else
        is_over_.store(true, std::memory_order_release);
      changes_.advance();
    }
  }

  void work(int phase, int begin, int end, int thread) {
    uint64_t sum = (uint64_t)begin;
    for (int unit = begin; unit < end; unit++) {
      if (!steps_.streams) {
        for (int64_t i = 0; i < steps_.unit_work; i++) {
          sum *= 3;
          asm volatile("" : "+r"(sum));  // or the compiler finds the closed form
        }
        continue;
      }
      const size_t words = (size_t)steps_.unit_work / sizeof(uint64_t);
      const size_t first = ((size_t)phase * (size_t)steps_.units + (size_t)unit) * words % (memory_.size() - words + 1);
      for (size_t i = first; i < first + words; i++) sum += memory_[i];
    }
    results_[(size_t)(thread * kLine)] += sum;
  }

  Pool& pool_;
  const HrPoolSteps steps_;
  std::vector<Counter> taken_;
  std::vector<uint64_t> results_, memory_;
  int phase_ = 0;
  Units units_;
  alignas(128) WaitWord changes_;
  alignas(128) std::atomic<bool> is_over_{true};
  std::atomic<bool> is_stopping_{false};
};

int check_steps(const HrPool* pool, const HrPoolSteps* steps, const int64_t* nanoseconds) {
  if (!pool || !steps || !nanoseconds) return fail("an argument is null");
  if (steps->steps < 1 || steps->phases < 1 || steps->units < 1 || steps->units > Units::kMost)
    return fail("%d steps of %d phases of %d units", steps->steps, steps->phases, steps->units);
  if (steps->unit_work < 0 || steps->gap_ns < 0 || steps->spin_ns < 0) return fail("a size or time is negative");
  if (steps->streams && steps->memory_bytes < steps->unit_work + 8) return fail("a unit is more than the memory");
  return 0;
}

}  // namespace

HrPool* hr_pool_create(int32_t num_threads, int64_t barrier_spin_ns, int64_t idle_spin_ns, int32_t is_pinned,
                       int32_t yields) {
  if (num_threads < 1 || num_threads > 1024) {
    fail("%d threads are out of range", num_threads);
    return nullptr;
  }
  try {
    PoolOptions options;
    if (barrier_spin_ns >= 0) options.barrier_spin_ns = barrier_spin_ns;
    if (idle_spin_ns >= 0) options.idle_spin_ns = idle_spin_ns;
    options.is_pinned = is_pinned != 0;
    options.yields = yields != 0;
    return new HrPool(num_threads, options);
  } catch (const std::exception& error) {
    fail("no pool: %s", error.what());
    return nullptr;
  }
}

void hr_pool_destroy(HrPool* pool) { delete pool; }

int hr_pool_is_pinned(const HrPool* pool) { return pool ? pool->threads.is_pinned() : fail("pool is null"); }

int64_t hr_pool_barrier_test(HrPool* pool, int32_t runs, int32_t barriers, int64_t* counts) {
  if (!pool || !counts) return fail("an argument is null");
  if (runs < 1 || barriers < 0) return fail("%d runs of %d barriers", runs, barriers);
  try {
    const size_t size = (size_t)(pool->threads.num_threads() * kLine);
    BarrierTest test = {&pool->threads, barriers, std::vector<int64_t>(size), std::vector<int64_t>(size)};
    for (int i = 0; i < runs; i++) pool->threads.run(BarrierTest::work, &test);
    int64_t wrong = 0;
    for (int thread = 0; thread < pool->threads.num_threads(); thread++) {
      counts[thread] = test.counts[(size_t)(thread * kLine)];
      wrong += test.wrong[(size_t)(thread * kLine)];
    }
    return wrong;
  } catch (const std::exception& error) {
    return fail("barrier test: %s", error.what());
  }
}

int hr_pool_steps_test(HrPool* pool, const HrPoolSteps* steps, int64_t* nanoseconds) {
  if (check_steps(pool, steps, nanoseconds)) return -1;
  try {
    SyntheticSteps(pool->threads, *steps).run(nanoseconds);
    return 0;
  } catch (const std::exception& error) {
    return fail("steps: %s", error.what());
  }
}
