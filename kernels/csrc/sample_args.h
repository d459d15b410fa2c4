// What the op `sample` is given: rows of logits and how to treat each. Filled by the native executor and by
// hr_sample_test; read by sample.h.
#pragma once

#include <cstddef>

#include "headrace_native.h"
#include "layout.h"

namespace headrace {

// Units: rows of logits. Results do not depend on the split, as no row looks at another.
struct SampleArgs {
  const float* logits;    // [rows][vocab_size], never written; any alignment
  int64_t logits_stride;  // floats between rows
  int32_t vocab_size;
  const HrRowSampling* rows;
  const int32_t* token_ids;  // what the offsets in `rows` point into
  const float* bias_values;
  HrRowResult* results;  // [rows]
  int32_t* top_ids;      // what `rows[i].top` points into
  double* top_logprobs;
  uint8_t* scratch;  // of this thread, sample_scratch_bytes; zeroed once, before its first use
};

// Vocabularies are read in groups of 64 tokens: 16 Philox blocks, 4 F32x16.
constexpr int kSampleGroup = 64;

// Entries of a scratch array that holds one element per token, with room to write whole F32x16 behind the last.
static inline size_t sample_padded(int32_t vocab_size) {
  return ((size_t)vocab_size + kSampleGroup - 1) / kSampleGroup * kSampleGroup + kSampleGroup;
}

// Entries of a scratch array that holds one element per group, likewise.
static inline size_t sample_padded_groups(int32_t vocab_size) {
  return ((size_t)vocab_size / kSampleGroup + 1 + 31) / 16 * 16;
}

// Bytes of SampleArgs::scratch; most rows touch only the beginnings of its arrays. sample_select.h lays them out.
static inline size_t sample_scratch_bytes(int32_t vocab_size) {
  return sample_padded(vocab_size) * (2 * 8 + 5 * 4) + sample_padded_groups(vocab_size) * (2 * 4);
}

}  // namespace headrace
