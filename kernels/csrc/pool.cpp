// See pool.h. Workers wait for the count of runs to change; in a run, and at its end, all threads meet.
#include "pool.h"

#include <atomic>
#include <memory>
#include <system_error>
#include <vector>

#include "cpus.h"
#include "pool_thread.h"
#include "wait_word.h"

namespace headrace {
namespace {

constexpr size_t kLine = 128;  // two cache lines: adjacent ones are fetched together

}  // namespace

struct Pool::State {
  struct Worker {
    State* pool;
    int thread;
    PoolThread handle;
  };

  State(int num_threads, const PoolOptions& options) : num_threads(num_threads), options(options) {}

  void start();
  void stop();
  void pin();
  void meet();
  void work_on(int thread);
  static void* main_of(void* worker);
  bool is_alone() const { return num_threads == 1 || num_forks() != forks_before; }

  const int num_threads;
  const PoolOptions options;
  const int forks_before = num_forks();
  std::vector<Worker> workers;
  std::vector<int> cpus;  // by thread; empty: not pinned
  CpuMask caller_affinity;
  int64_t caller_id = 0;

  // Written by the caller before it counts a run, read by workers afterwards.
  void (*work)(void* context, int thread) = nullptr;
  void* context = nullptr;
  bool is_stopping = false;

  alignas(kLine) WaitWord runs;                // that have begun
  alignas(kLine) WaitWord meetings;            // that are over
  alignas(kLine) std::atomic<int> arrived{0};  // at the next one
};

void Pool::State::start() {
  count_forks();
  if (num_threads > 1 && wants_pinning(options.is_pinned)) pin();
  workers.reserve((size_t)num_threads);  // threads hold pointers into it
  for (int thread = 1; thread < num_threads; thread++) {
    workers.push_back({this, thread, PoolThread()});
    const int failed = start_thread(workers.back().handle, main_of, &workers.back());
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

// In a forked child the workers that its memory speaks of do not exist, and nothing waits for them.
void Pool::State::stop() {
  if (!is_alone()) {
    is_stopping = true;
    runs.advance();
    for (const Worker& worker : workers) join_thread(worker.handle);
  }
  if (!cpus.empty()) restore_affinity(caller_id, caller_affinity);
}

// Release when arriving, acquire when all have: fetch_add is both, so the last to arrive has seen what the others
// wrote, and `advance` (release) hands that on to whoever waits (acquire). `arrived` is reset before the meeting is
// over, and nobody arrives at the next one before.
void Pool::State::meet() {
  const uint32_t seen = meetings.load();
  if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
    arrived.store(0, std::memory_order_relaxed);
    meetings.advance();
  } else {
    meetings.wait(seen, options.barrier_spin_ns, options.yields);
  }
}

// The count cannot pass a worker by: the caller counts the next run when the worker has met it at the end of this one.
void Pool::State::work_on(int thread) {
  for (uint32_t seen = 0;; seen += WaitWord::kStep) {
    runs.wait(seen, options.idle_spin_ns, options.yields);
    if (is_stopping) return;
    work(context, thread);
    meet();
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
  delete state_;
}

int Pool::num_threads() const { return state_->num_threads; }

bool Pool::is_pinned() const { return !state_->cpus.empty(); }

void Pool::run(void (*work)(void* context, int thread), void* context) {
  begin(work, context);
  work(context, 0);
  end();
}

void Pool::begin(void (*work)(void* context, int thread), void* context) {
  if (state_->is_alone()) return;
  state_->work = work;
  state_->context = context;
  state_->runs.advance();
}

void Pool::end() {
  if (!state_->is_alone()) state_->meet();
}

void Pool::barrier(int) {
  if (!state_->is_alone()) state_->meet();
}

}  // namespace headrace
