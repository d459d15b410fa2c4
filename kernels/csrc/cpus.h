// The physical cores that this thread may run on, and binding threads to them. Used by pool.cpp. On systems other than
// Linux there are none to be chosen, and nothing is bound.
#pragma once

#include <cstdint>
#include <vector>

namespace headrace {

// CPUs that a thread may run on; the bits of the system's cpu_set_t.
using CpuMask = std::vector<uint64_t>;

// Of the calling thread: what cpusets, taskset and whoever started the process have left. Empty where unknown.
CpuMask thread_affinity();

// One CPU of each physical core in the mask (the lowest of its SMT siblings), the core that the calling thread is on
// first.
std::vector<int> physical_cores(const CpuMask& mask);

// Bind the calling thread to a CPU. False where the system refuses.
bool bind_thread(int cpu);

// The calling thread, for `restore_affinity`.
int64_t thread_id();

// Give a thread of this process its CPUs back; nothing where it has ended.
void restore_affinity(int64_t thread_id, const CpuMask& mask);

}  // namespace headrace
