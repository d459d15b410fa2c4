// The C ABI of the executor (headrace_native.h). Nothing throws past here.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "error.h"
#include "executor.h"
#include "headrace_native.h"

struct HrExecutor {
  headrace::Program program;
  const headrace::KernelTable* kernels = nullptr;
  std::unique_ptr<headrace::Executor> executor;
  int32_t num_logits = 0;  // of the last step
};

using headrace::fail;

HrExecutor* hr_executor_create(const HrExecutorConfig* config) {
  try {
    auto made = std::make_unique<HrExecutor>();
    made->kernels = headrace::choose_kernels(std::getenv("HEADRACE_NATIVE_ISA"));
    if (!made->kernels) {
      fail("the instruction set that HEADRACE_NATIVE_ISA names cannot run here");
      return nullptr;
    }
    if (headrace::build_program(*config, made->program)) return nullptr;
    made->executor = std::make_unique<headrace::Executor>(made->program, *made->kernels, config->is_profiled != 0,
                                                          config->test_fault != 0);
    return made.release();
  } catch (const std::exception& error) {
    fail("the executor cannot be made: %s", error.what());
    return nullptr;
  }
}

void hr_executor_destroy(HrExecutor* executor) { delete executor; }

int hr_executor_run(HrExecutor* executor, const HrStepBatch* batch) {
  if (headrace::check_batch(executor->program, *batch)) return -1;
  executor->executor->run(*batch);
  executor->num_logits = batch->num_logits;
  return 0;
}

int hr_executor_logits(const HrExecutor* executor, float* out) {
  const headrace::Floats& logits = executor->program.logits;
  for (int32_t row = 0; row < executor->num_logits; row++, out += logits.width)
    std::memcpy(out, logits.data + row * logits.stride, (size_t)logits.width * sizeof(float));
  return 0;
}

int hr_executor_stats(const HrExecutor* executor, int64_t* nanoseconds, int32_t count) {
  const auto& measured = executor->executor->nanoseconds();
  if (count < 0 || (size_t)count != measured.size()) return fail("there are %zu numbers", measured.size());
  std::memcpy(nanoseconds, measured.data(), measured.size() * sizeof(int64_t));
  return 0;
}

const char* hr_executor_isa(const HrExecutor* executor) { return executor->kernels->name; }

int hr_executor_poison(HrExecutor* executor, int32_t block) {
  if (block < 0 || block >= executor->program.num_blocks) return fail("there is no block %d", block);
  for (const headrace::KvLayer& layer : executor->program.layers)
    std::memset(layer.data + block * layer.block_bytes, 255, (size_t)layer.block_bytes);
  return 0;
}
