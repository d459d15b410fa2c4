"""Steps that the executor runs before the first request: to find out what memory they take, to compile kernels, to see
how large keys and values are. All but the last touch the null block alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.gpu.shape import StepLimits


def decode_batch(null_block: int, block_size: int) -> StepBatch:
    """One decode row on the null block."""
    zero = np.zeros(1, np.int32)
    table = np.full((1, 1), null_block, np.int32)
    slot = np.array([null_block * block_size], np.int32)
    return StepBatch(zero, zero, slot, np.array([0, 1], np.int32), zero + 1, table, zero, (RowSampling(),))


def prefill_batch(limits: StepLimits, null_block: int) -> StepBatch:
    """The largest prefill step, all of it on the null block; the logits of one row."""
    length = min(limits.max_tokens, limits.max_model_len)
    positions = np.arange(length, dtype=np.int32)
    blocks = -(-length // limits.block_size)
    return StepBatch(
        token_ids=np.zeros(length, np.int32),
        positions=positions,
        slot_mapping=np.full(length, null_block * limits.block_size, np.int32),
        cu_seqlens_q=np.array([0, length], np.int32),
        seq_lens=np.array([length], np.int32),
        block_tables=np.full((1, blocks), null_block, np.int32),
        logit_rows=np.array([length - 1], np.int32),
        sampling=(RowSampling(),),
    )


def calibration_batch(limits: StepLimits, vocab_size: int, *, is_short: bool) -> StepBatch:
    """A prefill step of random tokens, always the same, in blocks 0, 1, 2, ..."""
    length = min(limits.max_tokens, limits.max_model_len, 32 if is_short else 512)
    batch = prefill_batch(replace(limits, max_tokens=length), null_block=0)
    tokens = np.random.default_rng(20).integers(0, vocab_size, length).astype(np.int32)
    tables = np.arange(batch.block_tables.shape[1], dtype=np.int32)[None]
    return replace(batch, token_ids=tokens, slot_mapping=batch.positions, block_tables=tables)


def warm_up_batches(limits: StepLimits, null_block: int) -> list[StepBatch]:
    """Steps that between them use every variant of the kernels that prompts and samplers do: tiles for few and many
    rows, rows that are and are not multiples of 16, one sequence and two, each way to sample."""
    most = min(limits.max_tokens, limits.max_model_len)
    lengths = sorted({min(length, most) for length in (2, 15, 16, 17, 32, 33, 64, 65, 100, 128, 250, most)})
    batches = [prefill_batch(replace(limits, max_tokens=length), null_block) for length in lengths]
    samplings = (
        RowSampling(),
        RowSampling(temperature=1.0, num_logprobs=0),
        RowSampling(temperature=1.0, top_k=5, top_p=0.5, num_logprobs=5),
        RowSampling(frequency_penalty=1.0, logit_bias=((1, 1.0),), output_ids=(1, 2)),
        RowSampling(target=1, num_logprobs=0),
    )
    one = batches[0]
    batches += [replace(one, sampling=(sampling,)) for sampling in samplings]
    if limits.max_seqs >= 2 and limits.max_tokens >= 2 * len(one.token_ids):
        batches += [replace(_twice(one), sampling=(sampling,) * 2) for sampling in samplings]
    return batches


def _twice(batch: StepBatch) -> StepBatch:
    """A batch of one sequence, twice beside itself."""
    count = len(batch.token_ids)
    return replace(
        batch,
        token_ids=np.tile(batch.token_ids, 2),
        positions=np.tile(batch.positions, 2),
        slot_mapping=np.tile(batch.slot_mapping, 2),
        cu_seqlens_q=np.array([0, count, 2 * count], np.int32),
        seq_lens=np.tile(batch.seq_lens, 2),
        block_tables=np.tile(batch.block_tables, (2, 1)),
        logit_rows=np.concatenate((batch.logit_rows, batch.logit_rows + count)),
    )
