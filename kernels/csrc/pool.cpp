// See pool.h. One counter of meetings does it all: a worker waits at a meeting for its next run, and all threads meet
// at each barrier and at the end of a run.
#include "pool.h"

#include <pthread.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <system_error>
#include <vector>

#include "cpus.h"
#include "wait_word.h"

namespace headrace {
namespace {

constexpr size_t kLine = 128;  // two cache lines: adjacent ones are fetched together

// How often this process is the child of a fork, counted in the child.
std::atomic<int> num_forks{0};

void count_forks() {
  static const int failed = pthread_atfork(nullptr, nullptr, [] { num_forks.fetch_add(1, std::memory_order_relaxed); });
  if (failed) throw std::system_error(failed, std::generic_category(), "pthread_atfork");
}

bool wants_pinning(bool otherwise) {
  const char* wanted = std::getenv("HEADRACE_NATIVE_PIN");
  return wanted && *wanted ? wanted[0] != '0' : otherwise;
}

void name_thread(int thread) {
  char name[16];  // the system's limit
  std::snprintf(name, sizeof name, "headrace-%d", thread);
#ifdef __APPLE__
  pthread_setname_np(name);
#else
  pthread_setname_np(pthread_self(), name);
#endif
}

// While one lives, threads that are made have all signals blocked, but for those that an instruction raises in the
// thread itself: the process's signals are for the thread that runs Python.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t signals;
    sigfillset(&signals);
    for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) sigdelset(&signals, own);
    pthread_sigmask(SIG_BLOCK, &signals, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

struct Pool::State {
  struct Worker {
    State* pool;
    int thread;
    pthread_t handle;
  };

  State(int num_threads, const PoolOptions& options) : num_threads(num_threads), options(options) {}

  void start();
  void stop();
  void pin();
  void meet(int64_t spin_ns);
  void work_on(int thread);
  static void* main_of(void* worker);
  bool is_forked() const { return num_forks.load(std::memory_order_relaxed) != forks_before; }

  const int num_threads;
  const PoolOptions options;
  const int forks_before = num_forks.load(std::memory_order_relaxed);
  std::vector<Worker> workers;
  std::vector<int> cpus;  // by thread; empty: not pinned
  CpuMask caller_affinity;
  int64_t caller_id = 0;

  // Written by the caller before it meets the workers, read by them afterwards.
  void (*work)(void* context, int thread) = nullptr;
  void* context = nullptr;
  bool is_stopping = false;

  alignas(kLine) WaitWord meetings;            // that are over
  alignas(kLine) std::atomic<int> arrived{0};  // at the next one
};

void Pool::State::start() {
  count_forks();
  if (num_threads > 1 && wants_pinning(options.is_pinned)) pin();
  workers.reserve((size_t)num_threads);  // threads hold pointers into it
  const BlockedSignals blocked;
  for (int thread = 1; thread < num_threads; thread++) {
    workers.push_back({this, thread, pthread_t()});
    const int failed = pthread_create(&workers.back().handle, nullptr, main_of, &workers.back());
    if (!failed) continue;
    workers.pop_back();
    stop();
    throw std::system_error(failed, std::generic_category(), "a thread cannot be started");
  }
}

// The caller first, so that the workers' masks are taken from what the process was given.
void Pool::State::pin() {
  caller_affinity = thread_affinity();
  cpus = physical_cores(caller_affinity);
  caller_id = thread_id();
  if ((int)cpus.size() < num_threads || !bind_thread(cpus[0])) cpus.clear();
}

// Workers are asleep or on their way to their first meeting; not all may have been made.
void Pool::State::stop() {
  if (is_forked()) return;
  is_stopping = true;
  // Missing ones are counted as arrived.
  arrived.fetch_add(num_threads - 1 - (int)workers.size(), std::memory_order_acq_rel);
  meet(0);
  for (const Worker& worker : workers) pthread_join(worker.handle, nullptr);
  if (!cpus.empty()) restore_affinity(caller_id, caller_affinity);
}

// Release when arriving, acquire when all have: fetch_add is both, so the last to arrive has seen what the others
// wrote, and `advance` (release) hands that on to whoever waits (acquire). `arrived` is reset before the meeting is
// over, and nobody arrives at the next one before.
void Pool::State::meet(int64_t spin_ns) {
  const uint32_t seen = meetings.load();
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
    arrived.store(0, std::memory_order_relaxed);
    meetings.advance();
  } else {
    meetings.wait(seen, spin_ns, options.yields);
  }
}

void Pool::State::work_on(int thread) {
  for (;;) {
    meet(options.idle_spin_ns);
    if (is_stopping) return;
    work(context, thread);
    meet(options.barrier_spin_ns);
  }
}

void* Pool::State::main_of(void* argument) {
  const Worker& worker = *(const Worker*)argument;
  State& pool = *worker.pool;
  name_thread(worker.thread);
  if (!pool.cpus.empty()) bind_thread(pool.cpus[(size_t)worker.thread]);
  pool.work_on(worker.thread);
  return nullptr;
}

Pool::Pool(int num_threads, PoolOptions options) {
  std::unique_ptr<State> state(new State(num_threads, options));
  state->start();
  state_ = state.release();
}

Pool::~Pool() {
  state_->stop();
  // In a forked child the workers that its memory speaks of do not exist, and nothing waits for them.
  delete state_;
}

int Pool::num_threads() const { return state_->num_threads; }

bool Pool::is_pinned() const { return !state_->cpus.empty(); }

void Pool::run(void (*work)(void* context, int thread), void* context) {
  State& state = *state_;
  if (state.num_threads == 1 || state.is_forked()) {
    work(context, 0);
    return;
  }
  state.work = work;
  state.context = context;
  state.meet(state.options.barrier_spin_ns);
  work(context, 0);
  state.meet(state.options.barrier_spin_ns);
}

void Pool::barrier(int) {
  if (state_->num_threads > 1 && !state_->is_forked()) state_->meet(state_->options.barrier_spin_ns);
}

}  // namespace headrace
