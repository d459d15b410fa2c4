// See wait_word.h. On Linux a thread sleeps in futex(2); elsewhere under one lock and condition variable for all words.
#include "wait_word.h"

#include <sched.h>

#include <chrono>

#if defined(__linux__) && !defined(HEADRACE_NO_FUTEX)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif

namespace headrace {
namespace {

// About half a microsecond: a barrier that is soon over reads no clock.
constexpr int kPausesPerLook = 32;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");  // `yield` is a no-op on most cores; this takes about as long as x86's pause
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

}  // namespace

bool WaitWord::spin(uint32_t seen, int64_t spin_ns, bool yields) const {
  for (int64_t deadline = 0;;) {
    for (int i = 0; i < kPausesPerLook; i++) {
      if (load() != seen) return true;
      pause();
    }
    const int64_t time = now();
    if (!deadline) deadline = time + spin_ns;
    if (time >= deadline) return false;
    if (yields) sched_yield();
  }
}

#if defined(__linux__) && !defined(HEADRACE_NO_FUTEX)

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t), "the kernel reads the word as it lies");

void WaitWord::sleep(uint32_t seen) {
  for (;;) {
    uint32_t word = seen;  // relaxed: the number itself is read by load(), below
    word_.compare_exchange_strong(word, seen | kSleeps, std::memory_order_relaxed);
    // The kernel looks again, under its own lock, so a change (and its wake) between the two is not missed.
    if (load() != seen) return;
    syscall(SYS_futex, &word_, FUTEX_WAIT_PRIVATE, seen | kSleeps, nullptr, nullptr, 0);
  }
}

void WaitWord::wake() { syscall(SYS_futex, &word_, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0); }

#else

namespace {
struct Dormitory {
  std::mutex mutex;
  std::condition_variable changed;
};
Dormitory& dormitory() {
  static Dormitory* const all = new Dormitory;  // never freed: threads may sleep here when the process ends
  return *all;
}
}  // namespace

void WaitWord::sleep(uint32_t seen) {
  std::unique_lock<std::mutex> lock(dormitory().mutex);
  uint32_t word = seen;
  word_.compare_exchange_strong(word, seen | kSleeps, std::memory_order_relaxed);
  dormitory().changed.wait(lock, [&] { return load() != seen; });
}

void WaitWord::wake() {
  {
    std::lock_guard<std::mutex> lock(dormitory().mutex);
  }  // who has looked, but does not sleep yet, is waited for
  dormitory().changed.notify_all();
}

#endif

}  // namespace headrace
