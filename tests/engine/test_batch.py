"""The arrays of a step, worked out by hand, and the sampling of its rows."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.engine.batch import BatchBuilder, row_sampling
from headrace.engine.scheduler import ScheduledSequence
from headrace.engine.sequence import Sequence
from headrace.kernels.batch import RowSampling

from tests.engine.support import config, request


def sequence(number: int, prompt: list[int], table: list[int], **sampling: object) -> Sequence:
    seq = Sequence(request(number, prompt, **sampling), number, 0.0)  # type: ignore[arg-type]
    seq.block_table = table
    return seq


def test_a_batch_of_a_decode_and_a_chunk() -> None:
    decode = sequence(1, [10, 11, 12, 13, 14, 15], [3, 7])
    chunk = sequence(2, list(range(20, 32)), [5, 2, 9])
    batch = BatchBuilder(config()).build([ScheduledSequence(decode, 5, 1, 1), ScheduledSequence(chunk, 2, 4, 0)])
    assert batch.token_ids.tolist() == [15, 22, 23, 24, 25]
    assert batch.positions.tolist() == [5, 2, 3, 4, 5]
    assert batch.slot_mapping.tolist() == [7 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3, 2 * 4, 2 * 4 + 1]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 5]
    assert batch.seq_lens.tolist() == [6, 6]
    assert batch.block_tables.tolist() == [[3, 7], [5, 2]]
    assert batch.logit_rows.tolist() == [0]
    assert [row.position for row in batch.sampling] == [6]
    for array in (batch.token_ids, batch.positions, batch.slot_mapping, batch.block_tables, batch.logit_rows):
        assert array.dtype == np.int32


def test_block_tables_are_padded_with_the_null_block() -> None:
    builder = BatchBuilder(config())
    long, short = sequence(1, list(range(9)), [4, 5, 6]), sequence(2, [1], [8])
    builder.build([ScheduledSequence(long, 0, 8, 0)])
    items = [ScheduledSequence(short, 0, 1, 1), ScheduledSequence(long, 8, 1, 1)]
    assert builder.build(items).block_tables.tolist() == [[8, 0, 0], [4, 5, 6]]


def test_rows_follow_sequences_that_move_grow_and_come_back() -> None:
    builder = BatchBuilder(config())
    first, second = sequence(1, list(range(8)), [4, 5]), sequence(2, list(range(8)), [6, 7])
    items = [ScheduledSequence(first, 7, 1, 1), ScheduledSequence(second, 7, 1, 1)]
    assert builder.build(items).block_tables.tolist() == [[4, 5], [6, 7]]
    assert builder.build(items[::-1]).block_tables.tolist() == [[6, 7], [4, 5]]
    second.block_table.append(9)
    second.tokens.append(8)
    assert builder.build([ScheduledSequence(second, 8, 1, 1)]).block_tables.tolist() == [[6, 7, 9]]
    second.block_table = [2, 3, 1]  # preempted and admitted again
    assert builder.build([ScheduledSequence(second, 8, 1, 1)]).block_tables.tolist() == [[2, 3, 1]]


def test_a_text_to_score_wants_a_row_per_position_with_the_next_token_as_target() -> None:
    seq = Sequence(request(1, [30, 31, 32, 33], score=True, num_logprobs=2), 0, 0.0)
    seq.block_table = [1]
    batch = BatchBuilder(config()).build([ScheduledSequence(seq, 0, 3, 2)])
    assert batch.logit_rows.tolist() == [1, 2]
    assert [(row.target, row.position, row.num_logprobs) for row in batch.sampling] == [(32, 2, 2), (33, 3, 2)]


def test_a_text_to_score_always_asks_for_log_probabilities() -> None:
    seq = Sequence(request(1, [30, 31], score=True), 0, 0.0)
    assert row_sampling(seq, 0).num_logprobs == 0


def test_every_parameter_reaches_the_row() -> None:
    seq = sequence(
        7,
        [1, 2],
        [1],
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logit_bias={4: 1.5},
        min_tokens=1,
        stop_token_ids=(9,),
        num_logprobs=5,
    )
    row = row_sampling(seq, 1)
    assert row.prompt_ids is seq.prompt, "lists are lent, not copied"
    assert row.output_ids is seq.outputs
    expected = RowSampling(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.4,
        logit_bias=((4, 1.5),),
        banned=(9,),
        seed=7,
        position=2,
        num_logprobs=5,
        prompt_ids=[1, 2],
        output_ids=[],
    )
    assert vars(row) == vars(expected)


@pytest.mark.parametrize(
    ("sampling", "has_prompt", "has_outputs"),
    [
        ({}, False, False),
        ({"repetition_penalty": 1.1}, True, True),
        ({"presence_penalty": -0.1}, False, True),
        ({"frequency_penalty": 0.1}, False, True),
    ],
)
def test_penalties_see_what_they_need(sampling: dict[str, float], has_prompt: bool, has_outputs: bool) -> None:
    seq = sequence(1, [1, 2], [1], **sampling)
    row = row_sampling(seq, 1)
    assert (row.prompt_ids is seq.prompt, row.output_ids is seq.outputs) == (has_prompt, has_outputs)


def test_stop_tokens_are_banned_until_min_tokens_are_there() -> None:
    seq = sequence(1, [1], [1], min_tokens=2, stop_token_ids=(9,))
    assert row_sampling(seq, 0).banned == (9,)
    seq.outputs.extend([3, 3])
    assert row_sampling(seq, 2).banned == ()
