// Op: from logits to tokens and log-probabilities; the C++ twin of headrace/kernels/sample/reference.py, which defines
// it. Included by isa_body.h.
//
// The order is vLLM's: logit bias, penalties, banned tokens, temperature, then top-k, top-p of what top-k left, min-p.
// A greedy row costs one pass over its logits. Weights are float32, their sums float64, scores and noise float64.
#pragma once

#include "sample_args.h"
#include "sample_draw.h"
#include "sample_math.h"
#include "sample_select.h"

namespace headrace::HR_ISA {

inline bool changes_logits(const HrRowSampling& s) {
  return s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0 || s.num_bias > 0 ||
         s.num_banned > 0;
}

// Divide or multiply the logits of all tokens seen, each once. `seen` are marks, all 0 before and after.
inline void penalise_repetition(float* logits, float penalty, const int32_t* ids[2], const int32_t counts[2],
                                int32_t* seen) {
  for (int list = 0; list < 2; list++) {
    for (int i = 0; i < counts[list]; i++) {
      const int32_t id = ids[list][i];
      if (seen[id]) continue;
      seen[id] = 1;
      logits[id] = logits[id] > 0.0f ? logits[id] / penalty : logits[id] * penalty;
    }
  }
  for (int list = 0; list < 2; list++)
    for (int i = 0; i < counts[list]; i++) seen[ids[list][i]] = 0;
}

inline void penalise_output(float* logits, float frequency, float presence, const int32_t* ids, int32_t num_ids,
                            int32_t* counts) {
  for (int i = 0; i < num_ids; i++) counts[ids[i]]++;
  for (int i = 0; i < num_ids; i++) {
    const int32_t id = ids[i];
    if (!counts[id]) continue;
    logits[id] -= frequency * (float)counts[id];
    logits[id] -= presence;
    counts[id] = 0;
  }
}

// Bias, penalties (repetition, then frequency and presence) and banned tokens, on a copy; scanned again.
inline SampleRow adjust(const SampleArgs& args, const SampleRow& row, const HrRowSampling& s, const Scratch& scratch) {
  float* logits = scratch.adjusted;
  std::memcpy(logits, row.logits, (size_t)row.vocab_size * sizeof(float));
  for (int i = 0; i < s.num_bias; i++) logits[args.token_ids[s.bias_ids + i]] += args.bias_values[s.bias_values + i];
  const int32_t* output = args.token_ids + s.output_ids;
  if (s.repetition_penalty != 1.0) {
    const int32_t* ids[2] = {args.token_ids + s.prompt_ids, output};
    const int32_t counts[2] = {s.num_prompt, s.num_output};
    penalise_repetition(logits, (float)s.repetition_penalty, ids, counts, scratch.counts);
  }
  if (s.presence_penalty != 0.0 || s.frequency_penalty != 0.0)
    penalise_output(logits, (float)s.frequency_penalty, (float)s.presence_penalty, output, s.num_output,
                    scratch.counts);
  const F32x16 largest = broadcast(FLT_MAX), lowest = broadcast(-FLT_MAX);
  for (int i = 0; i < row.vocab_size; i += 16)  // the scratch is padded
    store(logits + i, max(min(load(logits + i), largest), lowest));
  for (int i = 0; i < s.num_banned; i++) logits[args.token_ids[s.banned_ids + i]] = -HUGE_VALF;
  return scan_row(logits, row.vocab_size, scratch.adjusted_maxima);
}

// Ids and log-probabilities of the most likely tokens, by the unmodified logits; returns how many.
inline int32_t write_top(const SampleArgs& args, const SampleRow& row, const HrRowSampling& s, double log_sum,
                         Scratch& scratch) {
  const int wanted = s.num_logprobs < row.vocab_size ? s.num_logprobs : row.vocab_size;
  gather(row, floor_of_top(row, wanted), scratch.candidates);
  if (scratch.candidates.count > 4 * wanted + 64)
    keep_only(scratch.candidates, shortest_prefix(row, scratch.candidates, false, wanted, scratch));
  const Candidates& candidates = scratch.candidates;
  for (int i = 0; i < candidates.count; i++) scratch.ranks[i] = rank_of(candidates.logits[i], candidates.ids[i]);
  const uint64_t* ranks = sort_ranks(scratch.ranks, scratch.spare, candidates.count);
  for (int i = 0; i < wanted; i++) {
    const int32_t id = id_of(ranks[i]);
    const double logprob = row.logits[id] - log_sum;
    args.top_ids[s.top + i] = id;
    args.top_logprobs[s.top + i] = logprob < 0.0 ? logprob : 0.0;
  }
  return wanted;
}

inline void sample_row(const SampleArgs& args, int index, Scratch& scratch) {
  const HrRowSampling& s = args.rows[index];
  HrRowResult& result = args.results[index];
  result = {__builtin_nan(""), s.target > 0 ? s.target : 0, 0, 0, s.top};
  const SampleRow row = scan_row(args.logits + index * args.logits_stride, args.vocab_size, scratch.maxima);
  if (!row.is_finite) return;
  result.is_finite = 1;
  if (s.target < 0) {
    const SampleRow adjusted = changes_logits(s) ? adjust(args, row, s, scratch) : row;
    // With every token banned there is no better answer than the first.
    const bool is_greedy = s.temperature == 0.0 || adjusted.highest == -HUGE_VALF;
    result.token_id = is_greedy ? adjusted.argmax : draw_token(adjusted, cut_of(adjusted, s, scratch), s);
    if (s.num_logprobs < 0) return;
  }
  const double log_sum = row.highest + log_of(total_weight(row, 1.0f));
  const double logprob = row.logits[result.token_id] - log_sum;
  result.logprob = logprob < 0.0 ? logprob : 0.0;
  if (s.num_logprobs > 0) result.num_top = write_top(args, row, s, log_sum, scratch);
}

inline void sample_rows(const SampleArgs& args, int begin, int end) {
  Scratch scratch = scratch_of(args.scratch, args.vocab_size);
  for (int index = begin; index < end; index++) sample_row(args, index, scratch);
}

}  // namespace headrace::HR_ISA
