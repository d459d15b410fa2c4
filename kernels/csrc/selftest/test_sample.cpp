// Self-test of sampling: greedy, drawn, filtered, penalised and scored rows give the same tokens and probabilities.
#include "selftest.h"

namespace headrace::selftest {

void test_sample(Random& random) {
  const int32_t vocab_size = 1003, num_rows = 24, num_top = 5;
  Buffer<float> logits((size_t)num_rows * vocab_size);
  random.fill(logits.data(), logits.size());
  Buffer<HrRowSampling> rows(num_rows);
  Buffer<int32_t> ids(8), top_ids(num_rows * num_top);
  Buffer<float> bias(8);
  for (size_t i = 0; i < 8; i++) {
    ids[i] = random.below(vocab_size);
    bias[i] = random.number();
  }
  for (int32_t i = 0; i < num_rows; i++) {
    HrRowSampling& row = rows[(size_t)i];
    row.temperature = i % 4 == 0 ? 0.0 : 0.3 * (i % 4);
    row.top_p = i % 3 == 1 ? 0.9 : 1.0;
    row.min_p = i % 5 == 1 ? 0.05 : 0.0;
    row.top_k = i % 7 == 2 ? 40 : 0;
    row.repetition_penalty = i % 6 == 3 ? 1.2 : 1.0;
    row.presence_penalty = i % 6 == 3 ? 0.5 : 0.0;
    row.frequency_penalty = i % 6 == 3 ? 0.25 : 0.0;
    row.seed = random.next();
    row.target = i % 11 == 5 ? 7 : -1;
    row.position = i;
    row.num_logprobs = i % 2 ? num_top : -1;
    row.num_bias = i % 4 == 1 ? 8 : 0;
    row.num_banned = i % 8 == 6 ? 3 : 0;
    row.num_prompt = row.num_output = i % 6 == 3 ? 8 : 0;
    row.top = num_top * i;
  }
  Buffer<HrRowResult> results(num_rows);
  compare("sample", results, [&](const KernelTable& table, HrRowResult* to) {
    Buffer<uint8_t> scratch(sample_scratch_bytes(vocab_size));
    Buffer<double> top_logprobs((size_t)(num_rows * num_top));
    const SampleArgs args = {logits.data(), vocab_size, vocab_size,     rows.data(),         ids.data(),
                             bias.data(),   to,         top_ids.data(), top_logprobs.data(), scratch.data()};
    table.sample(args, 0, num_rows);
  });
}

}  // namespace headrace::selftest
