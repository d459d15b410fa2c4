// The C ABI of the native library: all that Python (headrace.kernels.native, by ctypes) may call.
//
// Plain C types only; no function throws. Functions that can fail return 0 or a negative code, and hr_last_error() has
// the sentence (per thread). Handles are made and freed by one thread; an executor runs on one thread at a time.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HR_API extern "C" __attribute__((visibility("default")))
#else
#define HR_API extern "C"
#endif

#define HR_ABI_VERSION 1

HR_API int hr_abi_version(void);
HR_API const char* hr_source_hash(void);        // of the sources that it was compiled from
HR_API const char* hr_isa_name(void);           // of the table in use, e.g. "avx512vnni"; "" where none can run
HR_API const char* hr_isa_names_compiled(void); // comma-separated
HR_API const char* hr_isa_names_usable(void);   // of those, what this CPU runs
HR_API const char* hr_last_error(void);

// How to treat one row of logits: headrace.kernels.batch.RowSampling, as headrace.kernels.native.sampling encodes it.
// `bias_ids`, `banned_ids`, `prompt_ids`, `output_ids` are offsets into one array of token ids, `bias_values` into one
// of float32 values (one per bias id), `top` into the arrays that take the num_logprobs most likely tokens.
typedef struct HrRowSampling {
  double temperature, top_p, min_p;
  double repetition_penalty, presence_penalty, frequency_penalty;
  uint64_t seed;
  int32_t target, top_k, position, num_logprobs;
  int32_t bias_ids, bias_values, num_bias;
  int32_t banned_ids, num_banned;
  int32_t prompt_ids, num_prompt;
  int32_t output_ids, num_output;
  int32_t top;
} HrRowSampling;

// One row of logits, used up: headrace.kernels.batch.RowResult. num_top entries were written at `top`.
typedef struct HrRowResult {
  double logprob;  // NaN where not asked for
  int32_t token_id, is_finite;
  int32_t num_top, top;
} HrRowResult;

// What the offsets in `samplings` point into. 0, or negative where an offset, a count or a token id is out of range:
// called before rows are sampled, as nothing is checked there.
HR_API int hr_check_samplings(const HrRowSampling* samplings, int32_t num_rows, int32_t vocab_size,
                              const int32_t* token_ids, int32_t num_token_ids, int32_t num_bias_values,
                              int32_t num_top);

// Sample rows of logits, float32 [num_rows][vocab_size], with the kernels of `isa` (null: those in use). For tests and
// benches. 0, or negative.
HR_API int hr_sample_test(const char* isa, const float* logits, int64_t logits_stride, int32_t num_rows,
                          int32_t vocab_size, const HrRowSampling* samplings, const int32_t* token_ids,
                          int32_t num_token_ids, const float* bias_values, int32_t num_bias_values,
                          HrRowResult* results, int32_t* top_ids, double* top_logprobs, int32_t num_top);
