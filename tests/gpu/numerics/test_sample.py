"""Sampling on the device: noise, the best token, draws from all, scoring, log-probabilities, bad rows, invariance."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from headrace.kernels.batch import RowSampling
from headrace.kernels.philox import philox4x32
from headrace.kernels.sample import sample as reference
from headrace.kernels.sample.device import DeviceTokens, pack_sampling, upload
from headrace.kernels.sample.triton import feed, sample
from headrace.kernels.sample.triton_noise import gumbel_of, philox_words

from tests.gpu.numerics.sample_case import check, run

F32 = np.float32


def normal(rows: int, vocab_size: int, scale: float = 3.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab_size)) * scale).astype(F32)


@triton.jit
def words_kernel(counter, out, position, low, high, N: tl.constexpr):
    place = tl.arange(0, N)
    key = low.to(tl.uint32, bitcast=True), high.to(tl.uint32, bitcast=True)
    words = philox_words(tl.load(counter + place).to(tl.uint32, bitcast=True), position.to(tl.uint32), key[0], key[1])
    for i in tl.static_range(4):
        tl.store(out + i * N + place, words[i].to(tl.int32, bitcast=True))


def test_the_words_are_those_of_the_reference(device: str) -> None:
    counter = np.array([0, 1, 2**31 - 1, 2**32 - 1, 37984, 5, 6, 7], np.uint32)
    seed, position = 0x9E3779B97F4A7C15, 123456
    low, high = (int(np.uint32(word).view(np.int32)) for word in (seed & 0xFFFFFFFF, seed >> 32))
    out = torch.zeros((4, 8), dtype=torch.int32, device=device)
    words_kernel[(1,)](torch.from_numpy(counter.view(np.int32)).to(device), out, position, low, high, 8)
    counters = np.zeros((4, 8), np.uint32)
    counters[0], counters[1] = counter, position
    want = philox4x32(counters, (seed & 0xFFFFFFFF, seed >> 32))
    assert np.array_equal(out.cpu().numpy().view(np.uint32), want)


@triton.jit
def gumbel_kernel(words, out, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + place, gumbel_of(tl.load(words + place).to(tl.uint32, bitcast=True)))


def test_the_noise_is_right_for_every_word_even_next_to_0_and_1(device: str) -> None:
    near_ends = np.concatenate([np.array([0, 1, 2, 3, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1]), 2 ** np.arange(1, 32)])
    spread = np.random.default_rng(0).integers(0, 2**32, 4096 - 2 * len(near_ends))
    words = np.concatenate([near_ends, 2**32 - 1 - near_ends, spread]).astype(np.uint32)
    out = torch.full((4096,), torch.nan, device=device)
    gumbel_kernel[(2,)](torch.from_numpy(words.view(np.int32)).to(device), out, 2048)
    want = -np.log(-np.log((words + 0.5) * 2.0**-32))
    assert np.abs(out.cpu().numpy() - want).max() < 2e-6


@pytest.mark.parametrize("vocab_size", [1, 7, 2047, 2048, 2049, 5000])
def test_best_draw_and_score_at_any_vocabulary(vocab_size: int, device: str) -> None:
    rows = [
        RowSampling(),
        RowSampling(num_logprobs=0),
        RowSampling(target=vocab_size - 1),
        RowSampling(temperature=0.7, seed=2**64 - 1, position=2**31 - 1, num_logprobs=0),
        RowSampling(temperature=1e-30, seed=5),
        RowSampling(temperature=50.0, seed=6),
    ]
    check(normal(len(rows), vocab_size), rows, device)


def test_of_equal_logits_the_lowest_id_is_taken(device: str) -> None:
    logits = np.zeros((3, 5000), F32)
    logits[0, [17, 18, 4000]] = 1.0
    logits[1, [2048, 4999]] = 1.0
    logits[2, ::2] = -0.0  # which equals 0
    assert [result.token_id for result in run(logits, [RowSampling()] * 3, device)] == [17, 2048, 0]


def test_a_thousand_seeds_draw_what_the_reference_draws(device: str) -> None:
    logits = np.tile(normal(1, 400, scale=2.0), (1000, 1))
    rows = [RowSampling(temperature=0.9, seed=seed * 0x9E3779B97F4A7C15 % 2**64, position=seed) for seed in range(1000)]
    got = [result.token_id for result in run(logits, rows, device)]
    want = [result.token_id for result in reference(logits, rows)]
    assert sum(a != b for a, b in zip(got, want, strict=True)) <= 1  # candidates within float32's last places
    assert len(set(got)) > 50


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_bad_row_is_marked_and_its_neighbours_are_not_touched(poison: float, device: str) -> None:
    logits = normal(6, 3000)
    rows = [
        RowSampling(),
        RowSampling(temperature=1.0, top_p=0.9, num_logprobs=3),
        RowSampling(target=7),
        RowSampling(temperature=1.0, num_logprobs=0),
        RowSampling(temperature=1.0, top_k=4, repetition_penalty=2.0, prompt_ids=(1, 2), num_logprobs=1),
        RowSampling(num_logprobs=2),
    ]
    clean = run(logits, rows, device)
    for bad in range(6):
        poisoned = logits.copy()
        poisoned[bad, 2500] = poison
        check(poisoned, rows, device)
        results = run(poisoned, rows, device)
        assert [result.is_finite for result in results] == [i != bad for i in range(6)]
        assert repr([r for i, r in enumerate(results) if i != bad]) == repr(
            [r for i, r in enumerate(clean) if i != bad]
        )


def test_extreme_but_finite_logits(device: str) -> None:
    largest = float(np.finfo(F32).max)
    logits = np.zeros((3, 64), F32)
    logits[:, 3], logits[:, 4] = largest, -largest
    rows = [RowSampling(num_logprobs=3), RowSampling(temperature=1.0, top_k=3), RowSampling(temperature=1.0, top_p=0.5)]
    results = run(logits, rows, device)
    assert [result.token_id for result in results] == [3, 3, 3]
    assert [i for i, _ in results[0].top] == [3, 0, 1]


@pytest.mark.parametrize("neighbours", [1, 7, 64])
def test_a_row_does_not_depend_on_its_neighbours(neighbours: int, device: str) -> None:
    logits = normal(neighbours + 4, 300, seed=1)
    filtered = RowSampling(temperature=1.3, top_k=40, top_p=0.9, min_p=0.01, seed=9, position=3, num_logprobs=5)
    penalised = replace(filtered, repetition_penalty=1.2, frequency_penalty=0.1, prompt_ids=(1, 2), output_ids=(3, 3))
    rows = [filtered, penalised, RowSampling(temperature=1.0, seed=4, num_logprobs=0), RowSampling(target=5)]
    others = [RowSampling(temperature=i % 3, seed=i, top_k=i % 5, banned=(i,)) for i in range(neighbours)]
    together = run(logits, others + rows, device)[neighbours:]
    alone = [run(logits[neighbours + i : neighbours + i + 1], [row], device)[0] for i, row in enumerate(rows)]
    assert repr(together) == repr(alone)


def test_tokens_feed_the_next_step(device: str) -> None:
    sampled = torch.tensor([11, 22, 33], dtype=torch.int32, device=device)
    token_ids = torch.arange(300, dtype=torch.int32, device=device)
    source = torch.full((300,), -1, dtype=torch.int32, device=device)
    source[0], source[7], source[299] = 2, 0, 1
    feed(sampled, source, token_ids)
    want = list(range(300))
    want[0], want[7], want[299] = 33, 11, 22
    assert token_ids.tolist() == want


def test_no_rows_and_what_does_not_fit(device: str) -> None:
    assert run(np.empty((0, 10), F32), [], device) == []
    packed = pack_sampling([RowSampling()])
    buffer = torch.empty(len(packed.words), dtype=torch.int32, device=device)
    params = upload(packed, torch.empty(len(packed.words), dtype=torch.int32), buffer)
    out = DeviceTokens.of(torch.empty(DeviceTokens.words_for(1), dtype=torch.int32, device=device), 1)
    logits, workspace = torch.zeros((1, 10), device=device), torch.zeros(100, device=device)
    sample(logits, params, out, workspace)
    for wrong in (
        lambda: sample(logits.half(), params, out, workspace),
        lambda: sample(torch.zeros((2, 10), device=device), params, out, workspace),
        lambda: sample(logits, params, out, workspace[:7]),
        lambda: sample(logits, replace(params, has_pending=True), out, workspace),
        lambda: feed(out.token_ids, buffer[:2], buffer[:3]),
    ):
        with pytest.raises(ValueError, match=r"sample|feed"):
            wrong()
    with pytest.raises(ValueError, match="staging holds 3"):
        upload(packed, torch.empty(3, dtype=torch.int32), buffer)
    with pytest.raises(ValueError, match="at most 20"):
        pack_sampling([RowSampling(num_logprobs=21)])
