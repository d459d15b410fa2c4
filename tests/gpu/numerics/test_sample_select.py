"""Rows with penalties and filters, and the most likely tokens, against the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from headrace.kernels.batch import RowSampling
from headrace.kernels.sample import sample as reference

from tests.gpu.numerics.sample_case import check, random_row, run

F32 = np.float32


def logits_of(kind: str, rows: int, vocab_size: int, rng: np.random.Generator) -> np.ndarray:
    """float: all different; coarse and bf16: many equal, as 16-bit products make them."""
    x = (rng.standard_normal((rows, vocab_size)) * rng.choice([0.5, 3.0, 8.0])).astype(F32)
    if kind == "coarse":
        return np.round(x * 2) / 2
    return torch.from_numpy(x).bfloat16().float().numpy() if kind == "bf16" else x


@pytest.mark.parametrize("kind", ["float", "coarse", "bf16"])
@pytest.mark.parametrize("vocab_size", [5, 40, 300, 2500])
def test_any_mixture_of_settings(vocab_size: int, kind: str, device: str) -> None:
    rng = np.random.default_rng(vocab_size)
    rows = [random_row(rng, vocab_size) for _ in range(16)]
    check(logits_of(kind, 16, vocab_size, rng), rows, device)


def drawn(logits: np.ndarray, row: RowSampling, device: str, times: int = 40) -> set[int]:
    """The tokens that come out at many positions."""
    rows = [replace(row, position=position) for position in range(times)]
    return {result.token_id for result in run(np.tile(logits, (times, 1)), rows, device)}


@pytest.mark.parametrize(
    ("row", "stay"),
    [
        (RowSampling(temperature=9.0, top_k=3), {1, 2, 4}),
        (RowSampling(temperature=9.0, top_k=4), {1, 2, 4, 0}),  # 0 and 3 are equal: the lower id stays
        (RowSampling(temperature=9.0, top_k=1), {4}),
        (RowSampling(temperature=1e9, top_p=0.5), {0, 1, 2, 3, 4, 5}),  # flat: the first half of the ranks, 6 of 12
        (RowSampling(temperature=1e9, top_k=4, top_p=0.5), {4, 1}),  # half of what top_k left
        (RowSampling(temperature=1e9, top_k=4, top_p=0.51), {4, 1, 2}),
        (RowSampling(temperature=1.0, top_p=1e-9), {4}),
        (RowSampling(temperature=9.0, min_p=1.0), {4}),
        (RowSampling(temperature=1e9, top_k=3, banned=(4,)), {1, 2, 0}),
        (RowSampling(temperature=1e9, banned=tuple(range(2, 12))), {0, 1}),
        (RowSampling(temperature=1e9, top_k=5, banned=tuple(range(2, 12))), {0, 1}),
    ],
)
def test_exactly_what_a_filter_leaves_is_drawn(row: RowSampling, stay: set[int], device: str) -> None:
    logits = np.array([2.0, 3.0, 3.0, 2.0, 4.0, 1.0, -1.0, -1.5, -2.0, -2.5, -3.0, -50.0], F32)
    assert drawn(logits, row, device) == stay


def test_equal_logits_across_blocks_stay_by_id(device: str) -> None:
    logits = np.zeros((1, 5000), F32)
    logits[0, [100, 2100, 4100, 4900]] = 1.0
    assert drawn(logits, RowSampling(temperature=1e9, top_k=3), device, times=16) == {100, 2100, 4100}
    [result] = run(logits, [RowSampling(num_logprobs=6)], device)
    assert [i for i, _ in result.top] == [100, 2100, 4100, 4900, 0, 1]


def test_a_vocabulary_of_one_value(device: str) -> None:
    logits = np.full((1, 3000), -7.25, F32)
    assert drawn(logits, RowSampling(temperature=1.0, top_k=2), device, times=12) == {0, 1}
    assert drawn(logits, RowSampling(temperature=1.0, top_p=3.5 / 3000), device, times=24) == {0, 1, 2, 3}


def test_each_penalty_alone_as_the_reference_rounds_it(device: str) -> None:
    rng = np.random.default_rng(3)
    seen = {"prompt_ids": tuple(range(0, 40, 2)), "output_ids": (1, 1, 1, 4, 6, 9, 9)}
    rows = [
        RowSampling(repetition_penalty=1.7, **seen),
        RowSampling(repetition_penalty=0.3, **seen),
        RowSampling(presence_penalty=1.9, **seen),
        RowSampling(frequency_penalty=0.77, **seen),
        RowSampling(frequency_penalty=-0.77, presence_penalty=-2.0, **seen),
        RowSampling(repetition_penalty=1e-38, **seen),
        RowSampling(logit_bias=((5, 100.0),)),
        RowSampling(logit_bias=((5, 100.0),), banned=(5,)),
        RowSampling(presence_penalty=2.0),  # nothing to look at yet
    ]
    for _ in range(4):
        check((rng.standard_normal((len(rows), 40)) * 2).astype(F32), rows, device)


def test_an_id_outside_the_vocabulary_changes_no_neighbour(device: str) -> None:
    logits = np.zeros((3, 40), F32)
    logits[:, 7] = 1.0
    bad = RowSampling(logit_bias=((47, 9.0), (-33, 9.0)), banned=(47,))
    assert [result.token_id for result in run(logits, [RowSampling(), bad, RowSampling()], device)] == [7, 7, 7]


def test_many_entries_in_one_row(device: str) -> None:
    rng = np.random.default_rng(4)
    ids = tuple(rng.integers(0, 3000, 2000).tolist())
    rows = [
        RowSampling(repetition_penalty=1.3, frequency_penalty=0.2, prompt_ids=ids, output_ids=ids[:700], num_logprobs=5)
    ]
    check((rng.standard_normal((1, 3000)) * 2).astype(F32), rows, device)


@pytest.mark.parametrize("newest", [3, 17])  # among the outputs already, and not
def test_a_token_that_is_still_on_the_device_counts_as_an_output(newest: int, device: str) -> None:
    logits = np.zeros((5, 30), F32)
    logits[:, 3], logits[:, 17], logits[:, 5] = 10.0, 9.9, 8.05
    previous = torch.tensor([5, 6, newest], dtype=torch.int32, device=device)
    # One occurrence more and 5 is the best of what is left.
    rows = [
        RowSampling(frequency_penalty=1.0, output_ids=(3, 17), banned=(20 - newest,), num_logprobs=1),
        RowSampling(repetition_penalty=1.3, logit_bias=((newest, 0.0),), banned=(20 - newest,)),
        RowSampling(repetition_penalty=1.3, banned=(20 - newest,)),
        RowSampling(presence_penalty=2.0, prompt_ids=(newest,), banned=(20 - newest,)),
        RowSampling(banned=(20 - newest,)),  # without a penalty it does not matter
    ]
    got = run(logits, rows, device, pending=[2] * 5, previous=previous)
    known = [replace(row, output_ids=(*row.output_ids, newest)) for row in rows]
    want = [result.token_id for result in reference(logits, known)]
    assert [result.token_id for result in got] == want == [5, 5, 5, 5, newest]
    without = run(logits, rows, device, pending=[-1] * 5, previous=previous)
    assert [result.token_id for result in without] == [newest] * 5


def test_one_step_with_everything(device: str) -> None:
    rng = np.random.default_rng(6)
    rows = [random_row(rng, 700) for _ in range(40)]
    rows[7], rows[20] = RowSampling(target=3, num_logprobs=20), RowSampling()
    logits = (rng.standard_normal((40, 700)) * 3).astype(F32)
    logits[9, 600] = np.nan
    check(logits, rows, device)
