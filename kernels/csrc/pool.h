// The executor's threads: persistent, pinned, spinning a little and then asleep. Made once by the executor, used for
// every step: all threads walk the step's op list together and meet at a barrier after each op.
#pragma once

#include <cstdint>

namespace headrace {

class Pool {
 public:
  // num_threads >= 1, the caller's own thread included, which is thread 0 of every run.
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const;

  // Every thread calls work(context, thread) once; returns when all have returned. One run at a time.
  void run(void (*work)(void* context, int thread), void* context);

  // Inside run, called by every thread the same number of times: returns when all threads have called it, and what
  // they wrote before is visible to all.
  void barrier(int thread);

 private:
  struct State;
  State* state_;
};

}  // namespace headrace
