// Drawing a token by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the highest logit / temperature + noise.
// Included by sample.h.
//
// The noise is g = -log(-log u) with u = (word + 0.5) / 2^32. A token of weight w = e^s, s = (logit - highest) /
// temperature, beats a score B only if -log u <= w e^-B, and 1 - u <= -log u: so a float32 comparison of the word with
// the weight sorts out nearly all tokens, and the exact float64 scores are computed for those few that are left.
#pragma once

#include "philox.h"
#include "sample_select.h"

namespace headrace::HR_ISA {

constexpr double kMaxGumbel = 22.9;  // more than the noise can be: 22.88, at word = 2^32 - 1
constexpr float kDoubt = 1.0001f;    // above the relative error of a float32 weight >= e^-26, which is 1e-5

struct Draw {
  const SampleRow& row;
  Cut cut;
  double temperature;
  float inverse;  // 1 / temperature
  double best;    // score of `token_id`, exact: float64, relative to the highest logit
  int32_t token_id;
  float reach;  // a token can only win if complement_24(word) <= reach * weight
  float floor;  // and only if its logit is at least this
};

inline void take(Draw& draw, int32_t token_id, double score, double exponential) {
  draw.best = score;
  draw.token_id = token_id;
  const double scaled = ((double)draw.row.logits[token_id] - (double)draw.row.highest) / draw.temperature;
  float lanes[16];
  store(lanes, exp_weight(broadcast((float)scaled)));
  draw.reach = (float)(exponential / lanes[0] * 16777216.0) * kDoubt;  // e^-best 2^24; scaled > -26.2, so no 0
  const double floor = draw.row.highest + draw.temperature * (score - kMaxGumbel);
  draw.floor = floor > draw.cut.logit ? (float)floor : draw.cut.logit;
}

// Let a token compete with its exact score; of equal scores the lowest id wins.
inline void compete(Draw& draw, int32_t token_id, uint32_t word) {
  const float logit = draw.row.logits[token_id];
  if (!keeps(draw.cut, logit, token_id)) return;
  const double exponential = -log_of((word + 0.5) * 0x1p-32);
  const double score = ((double)logit - (double)draw.row.highest) / draw.temperature - log_of(exponential);
  if (score > draw.best || (score == draw.best && token_id < draw.token_id)) take(draw, token_id, score, exponential);
}

// The tokens of a group that can win, as bits.
inline uint64_t contenders(const Draw& draw, const float* logits, const uint32_t* words) {
  const F32x16 reach = broadcast(draw.reach);
  uint64_t mask = 0;
  for (int i = 0; i < 4; i++) {
    const F32x16 weights = weight_of(load(logits + 16 * i), draw.row.highest, draw.inverse);
    mask |= (uint64_t)at_least(mul(weights, reach), complement_24(words + 16 * i)) << (16 * i);
  }
  return mask;
}

// The token drawn of those that `cut` keeps. The row has a logit above -infinity.
inline int32_t draw_token(const SampleRow& row, Cut cut, const HrRowSampling& sampling) {
  const PhiloxKeys keys = philox_keys(sampling.seed);
  const uint32_t position = (uint32_t)sampling.position;
  Draw draw = {row, cut, sampling.temperature, inverse_of(sampling.temperature), -HUGE_VAL, row.argmax, 0.0f, 0.0f};
  // The most likely token first: with a good score to beat, little is left to compute.
  compete(draw, row.argmax, philox_word((uint32_t)row.argmax, position, keys));
  float copy[kSampleGroup];
  uint32_t words[kSampleGroup];
  for (int group = 0; group < row.num_groups; group++) {
    if (row.maxima[group] < draw.floor) continue;
    philox_words((uint32_t)(group * (kSampleGroup / 4)), position, keys, words);
    const float* logits = group_logits(row, group, copy, -HUGE_VALF);
    for (uint64_t rest = contenders(draw, logits, words); rest; rest &= rest - 1) {
      const int i = __builtin_ctzll(rest);
      if (group * kSampleGroup + i < row.vocab_size) compete(draw, group * kSampleGroup + i, words[i]);
    }
  }
  return draw.token_id;
}

}  // namespace headrace::HR_ISA
