// Where a thread of the executor runs, for the threads that wait for it. Used by executor.cpp;
// docs/decisions/0006-waiting-policy.md says why, with numbers.
//
// Beside another busy process a thread is taken off its core for a time slice and keeps the units that it holds. The
// others soon have nothing to do but wait for it: an idle core, to which the kernel does not bring it at once, as what
// ran a moment ago counts as at home where it is. So whoever waits changes places with it, by their affinities, which
// are as before a moment later.
#pragma once

#include <atomic>
#include <cstdint>

#include "layout.h"

namespace headrace {

class Place {
 public:
  // Called by the thread itself before it works.
  void take();

  // Called by the thread itself: whether it holds units, so that others may come to wait for it.
  void set_busy(bool is_busy);
  bool is_busy() const { return is_busy_.load(std::memory_order_relaxed); }

  // Nanoseconds that it has run so far; negative where the system does not say.
  int64_t nanoseconds() const;

  // Called by another thread: the two change places. It goes on at once; the caller goes on when it is its turn over
  // there. Nothing where one of them may not run in the other's place, or where two threads already change places.
  void swap();

 private:
  alignas(kAlign) std::atomic<int64_t> thread_{0};
  std::atomic<int> cpu_{-1};
  std::atomic<bool> is_busy_{false};
};

}  // namespace headrace
