// A number that threads wait to see change: they spin on it for a while and then sleep until they are woken. Used by
// pool.cpp.
//
// The lowest bit says that somebody sleeps or is about to, so whoever changes the number learns in the same atomic
// operation whether anybody must be woken, and wakes nobody (a system call) where all are spinning.
#pragma once

#include <atomic>
#include <cstdint>

namespace headrace {

class WaitWord {
 public:
  // Whoever reads the new number sees what was written before it was changed: acquire here, release in `advance`.
  uint32_t load() const { return word_.load(std::memory_order_acquire) & ~kSleeps; }

  // Change the number and wake who sleeps. One thread at a time. acq_rel: the release publishes; the exchange must also
  // not be reordered with what follows.
  void advance() {
    const uint32_t next = load() + kStep;
    if (word_.exchange(next, std::memory_order_acq_rel) & kSleeps) wake();
  }

  // Returns when the number is no longer `seen`. Spins for at least spin_ns; then sleeps.
  void wait(uint32_t seen, int64_t spin_ns, bool yields) {
    if (!spin(seen, spin_ns, yields)) sleep(seen);
  }

 private:
  static constexpr uint32_t kSleeps = 1, kStep = 2;

  bool spin(uint32_t seen, int64_t spin_ns, bool yields) const;
  void sleep(uint32_t seen);
  void wake();

  std::atomic<uint32_t> word_{0};
};

}  // namespace headrace
