// Timing loops for bench/ops/linear.py, where a call from Python would cost more than what is measured. See
// headrace_native.h.
#include <time.h>

#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "abi_linear.h"
#include "error.h"
#include "headrace_native.h"

using namespace headrace;

namespace {

using Clock = std::chrono::steady_clock;

// Of this thread alone: what others on the machine take does not count.
double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

// Runs work(thread) on each of num_threads threads, the caller's one included; returns seconds, of one thread those
// that it ran.
template <typename Work>
double timed(int num_threads, Work work) {
  if (num_threads == 1) {
    const double start = cpu_seconds();
    work(0);
    return cpu_seconds() - start;
  }
  const Clock::time_point start = Clock::now();
  std::vector<std::thread> others;
  for (int thread = 1; thread < num_threads; thread++) others.emplace_back(work, thread);
  work(0);
  for (std::thread& other : others) other.join();
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

int hr_linear_bench(const char* isa, const HrMatrix* matrices, int32_t num_matrices, const HrLinear* op,
                    int32_t num_threads, int32_t repeats, double* seconds) {
  if (!matrices || num_matrices <= 0 || !seconds) return fail("matrices or seconds are missing");
  if (num_threads <= 0 || num_threads > 64 || repeats <= 0) return fail("threads or repeats are out of range");
  for (int i = 0; i < num_matrices; i++)
    if (check_linear(&matrices[i], op)) return -1;
  const KernelTable* table = kernels_of(isa);
  if (!table) return -1;
  *seconds = timed(num_threads, [&](int thread) {
    for (int i = 0; i < repeats * num_matrices; i++) {
      const LinearOp own(matrices[i % num_matrices], *op);
      const int64_t units = num_linear_units(own.matrix);
      table->linear(own.args, (int)(units * thread / num_threads), (int)(units * (thread + 1) / num_threads));
    }
  });
  return 0;
}

int hr_read_bench(const uint8_t* data, int64_t bytes, int32_t num_threads, int32_t repeats, double* seconds) {
  if (!data || !seconds || bytes < 64 || num_threads <= 0 || num_threads > 64 || repeats <= 0)
    return fail("nothing to read");
  uint64_t sums[64];
  *seconds = timed(num_threads, [&](int thread) {
    const uint64_t* words = (const uint64_t*)data;
    const int64_t begin = bytes / 64 * thread / num_threads * 8, end = bytes / 64 * (thread + 1) / num_threads * 8;
    uint64_t sum[8] = {};
    for (int repeat = 0; repeat < repeats; repeat++) {
      for (int64_t i = begin; i < end; i += 8) {
        __builtin_prefetch(words + i + 256);
        for (int j = 0; j < 8; j++) sum[j] += words[i + j];
      }
    }
    for (int j = 1; j < 8; j++) sum[0] += sum[j];
    sums[thread] = sum[0];
  });
  volatile uint64_t used = 0;  // what is never used is never read
  for (int thread = 0; thread < num_threads; thread++) used = used + sums[thread];
  return 0;
}
