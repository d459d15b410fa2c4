// What a step's batch must fulfil before anything runs: no kernel checks an index. Called by hr_executor_run; takes
// about 20 ns per row.
#include "error.h"
#include "program.h"

namespace headrace {
namespace {

int check_counts(const Program& p, const HrStepBatch& b) {
  if (b.num_tokens < 1 || b.num_tokens > p.max_tokens)
    return fail("a step of %d tokens; at most %d fit", b.num_tokens, p.max_tokens);
  if (b.num_logits < 0 || b.num_logits > p.max_logit_rows)
    return fail("%d rows of logits; at most %d fit", b.num_logits, p.max_logit_rows);
  if (b.num_seqs < 1 || b.num_seqs > b.num_tokens) return fail("%d sequences of %d tokens", b.num_seqs, b.num_tokens);
  if (b.block_table_width < 1 || b.block_table_width > p.num_blocks)
    return fail("block tables of %d blocks; there are %d", b.block_table_width, p.num_blocks);
  return 0;
}

// One sequence: its rows are the last of its tokens, in order, at the slots that its block table says.
int check_sequence(const Program& p, const HrStepBatch& b, int s) {
  const int32_t begin = b.cu_seqlens_q[s], end = b.cu_seqlens_q[s + 1], seq_len = b.seq_lens[s];
  if (end <= begin || end > b.num_tokens) return fail("cu_seqlens_q does not ascend at sequence %d", s);
  if (seq_len < end - begin) return fail("sequence %d has %d rows and %d tokens", s, end - begin, seq_len);
  const int32_t num_blocks = (seq_len - 1) / p.block_size + 1;
  if (num_blocks > b.block_table_width)
    return fail("sequence %d: %d tokens do not fit in %d blocks", s, seq_len, b.block_table_width);
  const int32_t* table = b.block_tables + (int64_t)s * b.block_table_width;
  for (int32_t i = 0; i < num_blocks; i++)
    if (table[i] < 0 || table[i] >= p.num_blocks) return fail("sequence %d: there is no block %d", s, table[i]);
  for (int32_t row = begin; row < end; row++) {
    const int32_t position = seq_len - end + row;
    if (b.positions[row] != position) return fail("row %d is at position %d, not %d", row, b.positions[row], position);
    const int32_t slot = table[position / p.block_size] * p.block_size + position % p.block_size;
    if (b.slot_mapping[row] != slot) return fail("row %d has slot %d, not %d", row, b.slot_mapping[row], slot);
    const int32_t id = b.token_ids[row];
    if (id < 0 || id > p.max_token_id) return fail("row %d: token %d is not in the vocabulary", row, id);
  }
  return 0;
}

}  // namespace

int check_batch(const Program& p, const HrStepBatch& b) {
  if (check_counts(p, b)) return -1;
  if (b.cu_seqlens_q[0] != 0 || b.cu_seqlens_q[b.num_seqs] != b.num_tokens)
    return fail("cu_seqlens_q runs from %d to %d", b.cu_seqlens_q[0], b.cu_seqlens_q[b.num_seqs]);
  for (int s = 0; s < b.num_seqs; s++)
    if (check_sequence(p, b, s)) return -1;
  int32_t last = -1;
  for (int i = 0; i < b.num_logits; i++) {
    if (b.logit_rows[i] <= last || b.logit_rows[i] >= b.num_tokens) return fail("logit_rows do not ascend at %d", i);
    last = b.logit_rows[i];
  }
  if (!b.samplings) return 0;
  return hr_check_samplings(b.samplings, b.num_logits, p.vocab_size, b.sampling_ids, b.num_sampling_ids,
                            b.num_bias_values, b.num_top);
}

}  // namespace headrace
