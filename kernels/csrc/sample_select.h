// Which tokens of a row may be drawn, without sorting the vocabulary. Included by sample.h.
//
// Tokens are ranked by logit, equal logits by id, lowest first. Every filter keeps a prefix of that one order, so what
// several filters keep is again a prefix, and its last token says it all: a `Cut`. To find it, most of the vocabulary
// is left out first by comparing whole groups of 64 tokens with a bound, by their highest logit; what remains is
// packed, halved by value until few candidates are left around the cut, and only those are sorted.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>

#include "sample_args.h"
#include "sample_math.h"

namespace headrace::HR_ISA {

// A row of logits. Finite, or -infinity for banned tokens.
struct SampleRow {
  const float* logits;
  int vocab_size;
  int num_groups;
  float* maxima;  // [num_groups], then -infinity up to a whole F32x16
  float highest;
  int argmax;  // the first of the highest
  bool is_finite;
};

struct Cut {  // the last token of a prefix of the ranks
  float logit;
  int32_t id;
};
inline bool keeps(Cut cut, float logit, int32_t id) {
  return logit > cut.logit || (logit == cut.logit && id <= cut.id);
}
constexpr Cut kKeepAll = {-FLT_MAX, INT_MAX};  // all but banned tokens

// Candidates in the order of their ids, padded to a whole F32x16 with -infinity of weight 0.
struct Candidates {
  float* logits;
  int32_t* ids;
  float* weights;
  int count;
};

struct Scratch {
  float* adjusted;
  int32_t* counts;  // all zero between rows
  float *maxima, *adjusted_maxima;
  Candidates candidates;
  uint64_t *ranks, *spare;
};

inline Scratch scratch_of(uint8_t* memory, int vocab_size) {
  const size_t tokens = sample_padded(vocab_size);
  Scratch s;
  s.ranks = (uint64_t*)memory;
  s.spare = s.ranks + tokens;
  s.adjusted = (float*)(s.spare + tokens);
  s.counts = (int32_t*)(s.adjusted + tokens);
  s.candidates = {(float*)(s.counts + tokens), (int32_t*)(s.counts + 2 * tokens), (float*)(s.counts + 3 * tokens), 0};
  s.maxima = s.candidates.weights + tokens;
  s.adjusted_maxima = s.maxima + sample_padded_groups(vocab_size);
  return s;
}

// The 64 logits of a group: where they lie, or, for the last one of an odd vocabulary, a copy padded with `pad`.
inline const float* group_logits(const SampleRow& row, int group, float* copy, float pad) {
  const float* logits = row.logits + (size_t)group * kSampleGroup;
  const int rest = row.vocab_size - group * kSampleGroup;
  if (rest >= kSampleGroup) return logits;
  for (int i = 0; i < kSampleGroup; i++) copy[i] = i < rest ? logits[i] : pad;
  return copy;
}

// One pass: the highest logit of each group and of all, and whether every logit is finite.
inline SampleRow scan_row(const float* logits, int vocab_size, float* maxima) {
  SampleRow row = {logits, vocab_size, (vocab_size + kSampleGroup - 1) / kSampleGroup, maxima, 0.0f, 0, false};
  const F32x16 zero = broadcast(0.0f);
  F32x16 poison[4] = {zero, zero, zero, zero};  // finite * 0 adds nothing; NaN and infinity leave NaN
  float copy[kSampleGroup];
  for (int group = 0; group < row.num_groups; group++) {
    const float* x = group_logits(row, group, copy, logits[(size_t)group * kSampleGroup]);
    F32x16 v[4];
    for (int i = 0; i < 4; i++) {
      v[i] = load(x + 16 * i);
      poison[i] = fma(v[i], zero, poison[i]);
    }
    maxima[group] = max_lane(max(max(v[0], v[1]), max(v[2], v[3])));
  }
  row.is_finite = sum(add(add(poison[0], poison[1]), add(poison[2], poison[3]))) == 0.0f;
  for (int i = 0; i < 16; i++) maxima[row.num_groups + i] = -HUGE_VALF;
  F32x16 highest = load(maxima);
  for (int i = 16; i < row.num_groups; i += 16) highest = max(highest, load(maxima + i));
  row.highest = max_lane(highest);
  int group = 0;
  while (group < row.num_groups - 1 && !(maxima[group] == row.highest)) group++;
  int i = group * kSampleGroup;
  while (i < vocab_size - 1 && !(logits[i] == row.highest)) i++;
  row.argmax = i;
  return row;
}

// e^((logit - highest) / temperature); `inverse` is 1 / temperature, finite.
inline F32x16 weight_of(F32x16 logits, float highest, float inverse) {
  return exp_weight(mul(sub(logits, broadcast(highest)), broadcast(inverse)));
}
inline float inverse_of(double temperature) {  // neither infinite nor 0, as 0 * infinity would be NaN
  const double inverse = 1.0 / temperature;
  return inverse > FLT_MAX ? FLT_MAX : inverse < FLT_MIN ? FLT_MIN : (float)inverse;
}

// The sum of all weights.
inline double total_weight(const SampleRow& row, float inverse) {
  LaneSums sums;
  float copy[kSampleGroup];
  for (int group = 0; group < row.num_groups; group++) {
    // Tokens of less than e^-40 do not show: a vocabulary of 2^20 of them would add 4e-12.
    if ((row.maxima[group] - row.highest) * inverse < -40.0f) continue;
    const float* x = group_logits(row, group, copy, -FLT_MAX);
    F32x16 w[4];
    for (int i = 0; i < 4; i++) w[i] = weight_of(load(x + 16 * i), row.highest, inverse);
    sums.add(add(add(w[0], w[1]), add(w[2], w[3])));
  }
  return sums.total();
}

inline void pad_candidates(Candidates& candidates) {
  for (int i = 0; i < 16; i++) {
    candidates.logits[candidates.count + i] = -HUGE_VALF;
    candidates.weights[candidates.count + i] = 0.0f;
  }
}

// All tokens whose logit is at least `floor`, which is finite.
inline void gather(const SampleRow& row, float floor, Candidates& candidates) {
  int n = 0;
  float copy[kSampleGroup];
  const F32x16 floors = broadcast(floor);
  for (int group = 0; group < row.num_groups; group++) {
    if (row.maxima[group] < floor) continue;
    const float* x = group_logits(row, group, copy, -HUGE_VALF);
    for (int i = 0; i < 4; i++) {
      const F32x16 v = load(x + 16 * i);
      n = append(at_least(v, floors), v, group * kSampleGroup + 16 * i, candidates.logits, candidates.ids, n);
    }
  }
  candidates.count = n;
  pad_candidates(candidates);
}

inline void keep_only(Candidates& candidates, Cut cut) {
  int n = 0;
  for (int i = 0; i < candidates.count; i++) {
    if (!keeps(cut, candidates.logits[i], candidates.ids[i])) continue;
    candidates.logits[n] = candidates.logits[i];
    candidates.ids[n++] = candidates.ids[i];
  }
  candidates.count = n;
  pad_candidates(candidates);
}

inline double weigh(Candidates& candidates, float highest, float inverse) {
  LaneSums sums;
  for (int i = 0; i < candidates.count; i += 16) {
    const F32x16 w = weight_of(load(candidates.logits + i), highest, inverse);
    store(candidates.weights + i, w);
    sums.add(w);
  }
  return sums.total();
}

struct Prefix {  // how many candidates have at least some logit, and what they weigh
  int count;
  double weight;
};

inline Prefix prefix_at_least(const Candidates& candidates, bool is_weighted, float logit) {
  LaneSums sums;
  int count = 0;
  const F32x16 bound = broadcast(logit), zero = broadcast(0.0f);
  for (int i = 0; i < candidates.count;) {
    F32x16 sum = zero;
    for (const int end = i + 128 < candidates.count ? i + 128 : candidates.count; i < end; i += 16) {
      const Mask16 mask = at_least(load(candidates.logits + i), bound);
      count += __builtin_popcount(mask);
      if (is_weighted) sum = add(sum, select(mask, load(candidates.weights + i), zero));
    }
    if (is_weighted) sums.add(sum);
  }
  return {count, is_weighted ? sums.total() : (double)count};
}

inline float lowest_of(const Candidates& candidates, float highest) {
  F32x16 lowest = broadcast(highest);
  for (int i = 0; i < candidates.count; i += 16) {
    const F32x16 v = load(candidates.logits + i);
    lowest = min(lowest, select(at_least(v, broadcast(-FLT_MAX)), v, lowest));  // not the padding
  }
  return -max_lane(sub(broadcast(0.0f), lowest));
}

// The candidates with low <= logit < high, in the order of their ranks; their index stands for the id.
struct Ranked {
  const uint64_t* ranks;
  int count;
};
inline Ranked rank_between(const Candidates& candidates, float low, float high, const Scratch& scratch) {
  int n = 0;
  for (int i = 0; i < candidates.count; i += 16) {
    const F32x16 v = load(candidates.logits + i);
    for (unsigned rest = at_least(v, broadcast(low)) & ~at_least(v, broadcast(high)); rest; rest &= rest - 1) {
      const int index = i + __builtin_ctz(rest);
      scratch.ranks[n++] = rank_of(candidates.logits[index], index);
    }
  }
  return {sort_ranks(scratch.ranks, scratch.spare, n), n};
}

// The shortest prefix of the candidates' ranks that weighs at least `wanted`: never empty, and all of them if they
// weigh less. Without `is_weighted` each weighs 1.
inline Cut shortest_prefix(const SampleRow& row, const Candidates& candidates, bool is_weighted, double wanted,
                           const Scratch& scratch) {
  // The cut lies among the logits in [low, high): those above weigh less than wanted, with them it is enough.
  float low = lowest_of(candidates, row.highest), high = HUGE_VALF, split = row.highest;
  Prefix above = {0, 0.0};
  int num_with = candidates.count;
  for (int step = 0; step < 24 && num_with - above.count > 32; step++) {
    const Prefix prefix = prefix_at_least(candidates, is_weighted, split);
    if (prefix.weight >= wanted) {
      low = split;
      num_with = prefix.count;
    } else {
      high = split;
      above = prefix;
    }
    split = 0.5f * low + 0.5f * (high < row.highest ? high : row.highest);
    if (split <= low || split >= high) break;
  }
  const Ranked ranked = rank_between(candidates, low, high, scratch);
  double weight = above.weight;
  int last = 0;
  for (; last < ranked.count - 1; last++) {
    weight += is_weighted ? candidates.weights[id_of(ranked.ranks[last])] : 1.0f;
    if (weight >= wanted) break;
  }
  const int index = id_of(ranked.ranks[last]);
  return {candidates.logits[index], candidates.ids[index]};
}

// A logit that at least `count` tokens reach, not far below the highest such.
inline float floor_of_top(const SampleRow& row, int count) {
  if (count > row.num_groups) return -FLT_MAX;
  float low = row.highest, high = row.highest;
  float distance = 0.0625f;
  for (int step = 0; step < 160; step++) {  // downwards by doubling until enough groups reach it, then halving
    int reached = 0;
    for (int i = 0; i < row.num_groups; i += 16)
      reached += __builtin_popcount(at_least(load(row.maxima + i), broadcast(low)));
    if (reached >= count) break;
    high = low;
    low = row.highest - distance;
    if (!(low > -FLT_MAX)) return -FLT_MAX;
    distance *= 2.0f;
  }
  for (int step = 0; step < 8; step++) {
    const float split = 0.5f * low + 0.5f * high;
    int reached = 0;
    for (int i = 0; i < row.num_groups; i += 16)
      reached += __builtin_popcount(at_least(load(row.maxima + i), broadcast(split)));
    if (reached < count) {
      high = split;
    } else {
      low = split;
      if (reached <= count + count / 8) break;
    }
  }
  return low;
}

// The lowest logit with (logit - highest) / temperature >= log(min_p), in float64: found by halving all floats.
inline float floor_of_min_p(const SampleRow& row, double temperature, double min_p) {
  const double bound = log_of(min_p);
  uint32_t low = order_key(-FLT_MAX), high = order_key(row.highest);  // the highest passes, as bound <= 0
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (((double)from_order_key(middle) - (double)row.highest) / temperature >= bound)
      high = middle;
    else
      low = middle + 1;
  }
  return from_order_key(high);
}

// A logit below which no token can be in the nucleus: n tokens of less than (1 - p) total / n each are less than the
// rest that the nucleus leaves out.
inline float floor_of_nucleus(const SampleRow& row, double temperature, double top_p, double total) {
  if (top_p > 1.0 - 1e-6) return -FLT_MAX;  // the rest is no more than what the sums are rounded by
  const double weight = 0.99 * (1.0 - top_p) * total / row.vocab_size;
  const double floor = row.highest + temperature * log_of(weight < 1.0 ? weight : 1.0);
  return floor > -FLT_MAX ? (float)floor : -FLT_MAX;
}

// What top-k, top-p of what top-k left, and min-p keep.
inline Cut cut_of(const SampleRow& row, const HrRowSampling& sampling, Scratch& scratch) {
  const float inverse = inverse_of(sampling.temperature);
  Candidates& candidates = scratch.candidates;
  Cut cut = kKeepAll;
  const bool has_top_k = sampling.top_k > 0 && sampling.top_k < row.vocab_size;
  if (has_top_k) {
    gather(row, floor_of_top(row, sampling.top_k), candidates);
    cut = shortest_prefix(row, candidates, false, sampling.top_k, scratch);
  }
  if (sampling.top_p < 1.0) {
    double total;
    if (has_top_k) {
      keep_only(candidates, cut);
      total = weigh(candidates, row.highest, inverse);
    } else {
      total = total_weight(row, inverse);
      gather(row, floor_of_nucleus(row, sampling.temperature, sampling.top_p, total), candidates);
      weigh(candidates, row.highest, inverse);
    }
    cut = shortest_prefix(row, candidates, true, sampling.top_p * total, scratch);
  }
  if (sampling.min_p > 0.0) {
    const float floor = floor_of_min_p(row, sampling.temperature, sampling.min_p);
    if (floor > cut.logit) cut = {floor, INT_MAX};
  }
  return cut;
}

}  // namespace headrace::HR_ISA
