// What pool.cpp needs to know of the system's threads: starting and naming them, signals, forks, the user's wish about
// pinning. Used by pool.cpp.
#pragma once

#include <pthread.h>

namespace headrace {

using PoolThread = pthread_t;

// Start a thread that leaves the process's signals to others: the one that runs Python wants them. 0, or an errno.
int start_thread(PoolThread& thread, void* (*main)(void*), void* argument);
void join_thread(PoolThread thread);

// The calling thread, as `top -H` shows it: headrace-1.
void name_thread(int thread);

// From the first call of count_forks on, how often this process is the child of a fork; counted in the child. Throws
// std::system_error.
void count_forks();
int num_forks();

// HEADRACE_NATIVE_PIN: 0 or 1; `otherwise` where that is not set.
bool wants_pinning(bool otherwise);

}  // namespace headrace
