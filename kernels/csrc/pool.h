// The executor's threads: persistent, spinning a little and then asleep. Made once by the executor, used for every
// step.
//
// How long they spin, and why they are not pinned: docs/decisions/0006-waiting-policy.md.
#pragma once

#include <cstdint>

namespace headrace {

// For bench/ops/pool.py; everybody else takes the defaults.
struct PoolOptions {
  int64_t barrier_spin_ns = 50'000;  // then a thread that waits for the others sleeps
  int64_t idle_spin_ns = 50'000;     // then a worker without a run sleeps
  bool is_pinned = false;            // each thread to a physical core of its own, where there are enough
  bool yields = false;               // while it spins, a thread offers its core to whoever wants it
};

class Pool {
 public:
  // num_threads >= 1, the caller's own thread included, which is thread 0 of every run. Throws std::system_error where
  // there are no more threads to be had. HEADRACE_NATIVE_PIN=1 or 0 overrides is_pinned.
  explicit Pool(int num_threads, PoolOptions options = PoolOptions());
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const;
  bool is_pinned() const;

  // Every thread calls work(context, thread) once; returns when all have returned. One run at a time, none from within
  // work. In a forked child, which has no workers, the caller is alone: work is called for thread 0 only.
  void run(void (*work)(void* context, int thread), void* context);

  // The two halves of a run, for a caller that does not work as thread 0 itself: `begin` returns at once, `end` when
  // all workers have returned. In a forked child both do nothing.
  void begin(void (*work)(void* context, int thread), void* context);
  void end();

  // Inside run, called by every thread the same number of times: returns when all threads have called it, and what
  // they wrote before is visible to all.
  void barrier(int thread);

 private:
  struct State;
  State* state_;
};

}  // namespace headrace
