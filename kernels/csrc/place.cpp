// See place.h. On systems other than Linux nobody moves.
#include "place.h"

#ifdef __linux__
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace headrace {
namespace {

constexpr int kMaskWords = 128;  // 8,192 CPUs, CONFIG_NR_CPUS of distributions' kernels

// Of all executors: who read the mask of a thread that another is moving would later give that back.
std::atomic_flag is_moving = ATOMIC_FLAG_INIT;

// What a thread of this process has run: the number that pthread_getcpuclockid makes (CPUCLOCK_PERTHREAD_MASK and
// CPUCLOCK_SCHED of the kernel's posix-timers.h), which asks for a pthread_t.
clockid_t clock_of(int64_t thread) { return (clockid_t)(~(uint32_t)thread << 3 | 4 | 2); }

// Moves a thread, 0 being the caller. False where it may not run there.
bool move(int64_t thread, int cpu) {
  uint64_t allowed[kMaskWords] = {}, one[kMaskWords] = {};
  const long bytes = syscall(SYS_sched_getaffinity, thread, sizeof allowed, allowed);
  if (bytes <= 0 || cpu / 64 >= bytes / 8 || !(allowed[cpu / 64] >> (cpu % 64) & 1)) return false;
  one[cpu / 64] = (uint64_t)1 << (cpu % 64);
  if (syscall(SYS_sched_setaffinity, thread, bytes, one)) return false;
  syscall(SYS_sched_setaffinity, thread, bytes, allowed);  // stays where it is now
  return true;
}

}  // namespace

void Place::take() { thread_.store(syscall(SYS_gettid), std::memory_order_relaxed); }

void Place::set_busy(bool is_busy) {
  if (is_busy) cpu_.store(sched_getcpu(), std::memory_order_relaxed);
  is_busy_.store(is_busy, std::memory_order_relaxed);
}

int64_t Place::nanoseconds() const {
  timespec time;
  if (clock_gettime(clock_of(thread_.load(std::memory_order_relaxed)), &time)) return -1;
  return (int64_t)time.tv_sec * 1'000'000'000 + time.tv_nsec;
}

void Place::swap() {
  const int there = cpu_.load(std::memory_order_relaxed), here = sched_getcpu();
  if (there < 0 || here < 0 || there == here || is_moving.test_and_set(std::memory_order_acquire)) return;
  if (move(thread_.load(std::memory_order_relaxed), here)) {
    cpu_.store(here, std::memory_order_relaxed);
    move(0, there);
  }
  is_moving.clear(std::memory_order_release);
}

}  // namespace headrace

#else

namespace headrace {

void Place::take() {}
void Place::set_busy(bool is_busy) { is_busy_.store(is_busy, std::memory_order_relaxed); }
int64_t Place::nanoseconds() const { return -1; }
void Place::swap() {}

}  // namespace headrace

#endif
