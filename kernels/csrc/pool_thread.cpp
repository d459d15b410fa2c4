// See pool_thread.h.
#include "pool_thread.h"

#include <signal.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <system_error>

namespace headrace {
namespace {

std::atomic<int> forks{0};

}  // namespace

int start_thread(PoolThread& thread, void* (*main)(void*), void* argument) {
  sigset_t blocked, before;
  sigfillset(&blocked);
  // Raised by an instruction of the thread itself, and then faulthandler's.
  for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&blocked, own);
  pthread_sigmask(SIG_BLOCK, &blocked, &before);  // a new thread has its maker's
  const int failed = pthread_create(&thread, nullptr, main, argument);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return failed;
}

void join_thread(PoolThread thread) { pthread_join(thread, nullptr); }

void name_thread(int thread) {
  char name[16];  // the system's limit
  std::snprintf(name, sizeof name, "headrace-%d", thread);
#ifdef __APPLE__
  pthread_setname_np(name);
#else
  pthread_setname_np(pthread_self(), name);
#endif
}

void count_forks() {
  static const int failed = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  if (failed) throw std::system_error(failed, std::generic_category(), "pthread_atfork");
}

int num_forks() { return forks.load(std::memory_order_relaxed); }

bool wants_pinning(bool otherwise) {
  const char* wanted = std::getenv("HEADRACE_NATIVE_PIN");
  return wanted && *wanted ? wanted[0] != '0' : otherwise;
}

}  // namespace headrace
