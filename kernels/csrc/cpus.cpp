// See cpus.h.
#include "cpus.h"

#ifdef __linux__
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

namespace headrace {
namespace {

constexpr int kMostCpus = 8192;  // CONFIG_NR_CPUS of distributions' kernels

bool has(const CpuMask& mask, int cpu) {
  return cpu >= 0 && (size_t)cpu / 64 < mask.size() && (mask[(size_t)cpu / 64] >> (cpu % 64) & 1);
}

// The lowest CPU of the core that `cpu` belongs to; `cpu` itself where the system does not say. The file is a list such
// as "0,64" or "0-1".
int core_of(int cpu) {
  char path[96];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
  std::FILE* file = std::fopen(path, "re");
  if (!file) return cpu;
  int first = cpu;
  if (std::fscanf(file, "%d", &first) != 1) first = cpu;
  std::fclose(file);
  return first;
}

}  // namespace

CpuMask thread_affinity() {
  CpuMask mask(kMostCpus / 64, 0);
  // The system call, as glibc's function knows sets of 1,024 CPUs only without further ado.
  const long bytes = syscall(SYS_sched_getaffinity, 0, mask.size() * sizeof(uint64_t), mask.data());
  mask.resize(bytes > 0 ? (size_t)bytes / sizeof(uint64_t) : 0);
  return mask;
}

std::vector<int> physical_cores(const CpuMask& mask) {
  const int here = sched_getcpu();
  const int first = has(mask, here) ? core_of(here) : -1;
  std::vector<int> cpus, cores;
  for (int cpu = 0; cpu < (int)mask.size() * 64; cpu++) {
    if (!has(mask, cpu)) continue;
    const int core = core_of(cpu);
    bool is_known = false;
    for (int other : cores) is_known |= other == core;
    if (is_known) continue;
    cpus.insert(core == first ? cpus.begin() : cpus.end(), cpu);
    cores.push_back(core);
  }
  return cpus;
}

bool bind_thread(int cpu) {
  CpuMask mask((size_t)cpu / 64 + 1, 0);
  mask.back() = (uint64_t)1 << (cpu % 64);
  return syscall(SYS_sched_setaffinity, 0, mask.size() * sizeof(uint64_t), mask.data()) == 0;
}

int64_t thread_id() { return syscall(SYS_gettid); }

void restore_affinity(int64_t thread_id, const CpuMask& mask) {
  // Signal 0 asks whether the thread is one of this process: its number may be another's by now.
  if (mask.empty() || syscall(SYS_tgkill, getpid(), thread_id, 0) != 0) return;
  syscall(SYS_sched_setaffinity, thread_id, mask.size() * sizeof(uint64_t), mask.data());
}

}  // namespace headrace

#else

namespace headrace {

CpuMask thread_affinity() { return {}; }
std::vector<int> physical_cores(const CpuMask&) { return {}; }
bool bind_thread(int) { return false; }
int64_t thread_id() { return 0; }
void restore_affinity(int64_t, const CpuMask&) {}

}  // namespace headrace

#endif
