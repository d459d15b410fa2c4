"""The batch on its way to the device: padding rows that reach nobody, two host buffers, calls of attention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from headrace.kernels.gpu.shape import AttentionCall, StepLimits, decode_shape, ladder, shape_of
from headrace.kernels.gpu.staging import Staging

from tests.support.stepping import step_batch

LIMITS = StepLimits(max_tokens=16, max_seqs=4, max_logit_rows=8, max_model_len=40, block_size=4)
CPU = torch.device("cpu")


def test_what_was_filled_is_on_the_device_after_one_copy() -> None:
    staging = Staging(LIMITS, CPU, num_extra=6)
    batch = step_batch([([7, 8, 9], 2, [5, 6]), ([3], 4, [1, 2])], 4, last_only=True)
    staging.fill(batch, num_seqs=2, null_block=9)
    staging.extra()[:] = np.arange(6)
    staging.send(2)
    on_device = staging.batch
    for name in ("token_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens", "logit_rows"):
        want = getattr(batch, name)
        np.testing.assert_array_equal(getattr(on_device, name)[: len(want)].numpy(), want, err_msg=name)
    assert on_device.block_tables[:2, :2].tolist() == [[5, 6], [1, 2]]
    assert on_device.extra.tolist() == list(range(6))


def test_padding_rows_write_to_the_null_block_and_read_it() -> None:
    staging = Staging(LIMITS, CPU)
    # A fuller step first: what it leaves behind must not become part of the padding.
    staging.fill(step_batch([([7], 30, [3] * 8), ([8], 31, [4] * 8), ([9], 6, [7, 8])], 4), num_seqs=3, null_block=9)
    staging.send(3)
    staging.fill(step_batch([([1], 1, [2])], 4), num_seqs=1, null_block=9)
    staging.fill(step_batch([([5], 6, [1, 2])], 4), num_seqs=4, null_block=9)
    staging.send(4)
    batch = staging.batch
    assert batch.token_ids[:4].tolist() == [5, 0, 0, 0]
    assert batch.slot_mapping[:4].tolist() == [2 * 4 + 2, 36, 36, 36]
    assert batch.positions[:4].tolist() == [6, 0, 0, 0]
    assert batch.cu_seqlens_q[:5].tolist() == [0, 1, 2, 3, 4]
    assert batch.seq_lens[:4].tolist() == [7, 1, 1, 1]
    assert batch.logit_rows[:4].tolist() == [0, 1, 2, 3]
    assert batch.block_tables[:, 0].tolist() == [1, 9, 9, 9]


def test_the_buffer_of_the_step_in_flight_is_left_alone() -> None:
    staging = Staging(LIMITS, CPU)
    staging.fill(step_batch([([5], 0, [1])], 4), num_seqs=1, null_block=9)
    first, host = staging.slot, staging._hosts[staging.slot].copy()
    staging.fill(step_batch([([6, 7], 0, [2])], 4), num_seqs=1, null_block=9)
    assert staging.slot != first
    np.testing.assert_array_equal(staging._hosts[first], host)


def test_a_batch_that_is_too_large_is_refused_by_name() -> None:
    fits = step_batch([([1], 0, [1])], 4)
    LIMITS.check(fits)
    for what, batch in (
        ("17 tokens", step_batch([([1] * 17, 0, [1] * 5)], 4, last_only=True)),
        ("5 sequences", step_batch([([1], 0, [1])] * 5, 4)),
        ("9 rows of logits", step_batch([([1] * 9, 0, [1, 2, 3])], 4)),
        ("11 blocks", step_batch([([1], 0, [1] * 11)], 4)),
        ("0 to sample", replace(fits, sampling=())),
    ):
        with pytest.raises(ValueError, match=what):
            LIMITS.check(batch)


def test_attention_is_called_on_decode_rows_and_chunks_apart() -> None:
    batch = step_batch([([1], 8, [1]), ([2], 3, [1]), ([3, 4], 6, [1]), ([5] * 5, 0, [1])], 64, last_only=True)
    shape = shape_of(batch, lambda num_seqs, max_query_len, max_seq_len: True)
    assert shape.attention == (AttentionCall(0, 2, 1, 9), AttentionCall(2, 4, 5, 8))
    assert (shape.num_tokens, shape.num_seqs, shape.num_logits, shape.selects_all) == (9, 4, 4, False)
    narrow = shape_of(batch, lambda num_seqs, max_query_len, max_seq_len: num_seqs * max_query_len <= 5)
    assert [(call.begin, call.end) for call in narrow.attention] == [(0, 2), (2, 3), (3, 4)]
    decode = step_batch([([1], 8, [1]), ([2], 3, [1])], 64)
    assert shape_of(decode, lambda *sizes: True) == decode_shape(2, 9, lambda *sizes: True)
    shape = decode_shape(7, 100, lambda num_seqs, max_query_len, max_seq_len: num_seqs <= 2)
    assert [(call.begin, call.end) for call in shape.attention] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert shape.selects_all


def test_the_ladder_ends_at_the_most_sequences() -> None:
    assert ladder(1) == (1,)
    assert ladder(6) == (1, 2, 4, 6)
    assert ladder(64) == (1, 2, 4, 8, 16, 32, 48, 64)
    assert ladder(300)[-4:] == (128, 192, 256, 300)
