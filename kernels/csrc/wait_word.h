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
  static constexpr uint32_t kStep = 2;

  explicit WaitWord(uint32_t first = 0) : word_(first) {}

  // Whoever reads the new number sees what was written before it was changed: acquire here, release in `advance`.
  uint32_t load() const { return word_.load(std::memory_order_acquire) & ~kSleeps; }

  // Change the number and wake who sleeps; several threads may at the same time. acq_rel: the release publishes; the
  // addition must also not be reordered with what follows. Whoever sets the bit for the new number while it is cleared
  // here is woken too, or not put to sleep by the kernel, which finds another word; it looks and sleeps again.
  void advance() {
    if (word_.fetch_add(kStep, std::memory_order_acq_rel) & kSleeps) {
      word_.fetch_and(~kSleeps, std::memory_order_relaxed);
      wake();
    }
  }

  // Returns when the number is no longer `seen`. Spins for at least spin_ns; then sleeps.
  void wait(uint32_t seen, int64_t spin_ns, bool yields) {
    if (!spin(seen, spin_ns, yields)) sleep(seen);
  }

  // The two halves of wait. True: the number has changed.
  bool spin(uint32_t seen, int64_t spin_ns, bool yields) const;
  void sleep(uint32_t seen);

 private:
  static constexpr uint32_t kSleeps = 1;

  void wake();

  std::atomic<uint32_t> word_{0};
};

}  // namespace headrace
