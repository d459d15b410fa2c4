// The C ABI of the op `sample`: checks what Python hands over, and runs it alone for tests and benches. The native
// executor checks with hr_check_samplings as well, and calls the kernel from its own threads.
#include <cstdlib>

#include "error.h"
#include "headrace_native.h"
#include "kernel_table.h"

namespace headrace {
namespace {

struct Range {
  const char* name;
  int32_t first, count, limit;
};

bool is_inside(const Range& range) {
  return range.count >= 0 && range.first >= 0 && range.first <= range.limit && range.count <= range.limit - range.first;
}

int check_row(const HrRowSampling& s, int32_t row, int32_t vocab_size, const int32_t* token_ids, int32_t num_token_ids,
              int32_t num_bias_values, int32_t num_top) {
  if (s.target >= vocab_size) return fail("row %d: the target %d is not in the vocabulary", row, s.target);
  if (!(s.temperature >= 0.0)) return fail("row %d: the temperature is negative or NaN", row);
  const int32_t tops = s.num_logprobs < vocab_size ? s.num_logprobs : vocab_size;
  const Range ranges[] = {
      {"bias ids", s.bias_ids, s.num_bias, num_token_ids},
      {"banned ids", s.banned_ids, s.num_banned, num_token_ids},
      {"prompt ids", s.prompt_ids, s.num_prompt, num_token_ids},
      {"output ids", s.output_ids, s.num_output, num_token_ids},
      {"bias values", s.bias_values, s.num_bias, num_bias_values},
      {"log-probabilities", s.top, tops > 0 ? tops : 0, num_top},
  };
  for (const Range& range : ranges)
    if (!is_inside(range)) return fail("row %d: the %s are out of range", row, range.name);
  for (int list = 0; list < 4; list++)
    for (int32_t i = 0; i < ranges[list].count; i++) {
      const int32_t id = token_ids[ranges[list].first + i];
      if (id < 0 || id >= vocab_size)
        return fail("row %d: %s: %d is not in the vocabulary", row, ranges[list].name, id);
    }
  return 0;
}

}  // namespace
}  // namespace headrace

int hr_check_samplings(const HrRowSampling* samplings, int32_t num_rows, int32_t vocab_size, const int32_t* token_ids,
                       int32_t num_token_ids, int32_t num_bias_values, int32_t num_top) {
  if (num_rows < 0 || vocab_size < 1 || num_token_ids < 0 || num_bias_values < 0 || num_top < 0)
    return headrace::fail("a size is out of range");
  if ((num_rows > 0 && !samplings) || (num_token_ids > 0 && !token_ids)) return headrace::fail("an array is null");
  for (int32_t row = 0; row < num_rows; row++) {
    const int status =
        headrace::check_row(samplings[row], row, vocab_size, token_ids, num_token_ids, num_bias_values, num_top);
    if (status) return status;
  }
  return 0;
}

int hr_sample_test(const char* isa, const float* logits, int64_t logits_stride, int32_t num_rows, int32_t vocab_size,
                   const HrRowSampling* samplings, const int32_t* token_ids, int32_t num_token_ids,
                   const float* bias_values, int32_t num_bias_values, HrRowResult* results, int32_t* top_ids,
                   double* top_logprobs, int32_t num_top) {
  const headrace::KernelTable* table = headrace::choose_kernels(isa ? isa : std::getenv("HEADRACE_NATIVE_ISA"));
  if (!table) return headrace::fail("the instruction set %s cannot run here", isa ? isa : "that is forced");
  if (!logits || !results || (num_bias_values > 0 && !bias_values) || (num_top > 0 && (!top_ids || !top_logprobs)))
    return headrace::fail("an array is null");
  if (logits_stride < vocab_size) return headrace::fail("rows of %d logits overlap", vocab_size);
  if (hr_check_samplings(samplings, num_rows, vocab_size, token_ids, num_token_ids, num_bias_values, num_top))
    return -1;
  // Kept from call to call, as the executor keeps its own: it must be zero only once, and its pages cost time.
  static thread_local uint8_t* scratch = nullptr;
  static thread_local size_t scratch_bytes = 0;
  const size_t wanted = headrace::sample_scratch_bytes(vocab_size);
  if (wanted != scratch_bytes) {
    std::free(scratch);
    scratch = static_cast<uint8_t*>(std::calloc(1, wanted));
    scratch_bytes = scratch ? wanted : 0;
    if (!scratch) return headrace::fail("no memory for %zu bytes", wanted);
  }
  headrace::SampleArgs args = {logits,      logits_stride, vocab_size, samplings,    token_ids,
                               bias_values, results,       top_ids,    top_logprobs, scratch};
  table->sample(args, 0, num_rows);
  return 0;
}
