"""Sampling against naive references: plain loops, full sorts, noise for every token."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from headrace.kernels.batch import RowSampling
from headrace.kernels.philox import gumbel
from headrace.kernels.sample import sample

NAN = float("nan")


def draw(logits: np.ndarray, row: RowSampling) -> int:
    [result] = sample(logits[None].astype(np.float32), (row,))
    assert result.is_finite
    return result.token_id


def naive_kept(logits: np.ndarray, row: RowSampling) -> list[int]:
    """Token ids that survive the filters, by a full sort and running sums."""
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if row.top_k:
        ranked = ranked[: row.top_k]
    highest = float(logits[ranked[0]])
    weights = [math.exp((float(logits[i]) - highest) / row.temperature) for i in ranked]
    if row.top_p < 1.0:
        running, keep = 0.0, 0
        while keep < len(ranked) and running < row.top_p * sum(weights):
            running += weights[keep]
            keep += 1
        ranked, weights = ranked[:keep], weights[:keep]
    return [i for i, weight in zip(ranked, weights, strict=True) if weight >= row.min_p * weights[0]]


def naive_draw(logits: np.ndarray, row: RowSampling) -> int:
    noise = gumbel(row.seed, row.position, np.arange(len(logits)))
    return max(naive_kept(logits, row), key=lambda i: float(logits[i]) / row.temperature + noise[i])


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.9},
    {"top_p": 0.31},
    {"top_p": 1e-6},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.05},
    {"top_p": 0.7, "min_p": 0.3},
    {},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
@pytest.mark.parametrize("ties", [False, True])
def test_draws_are_those_of_the_naive_reference(filters: dict[str, float], temperature: float, ties: bool) -> None:
    rng = np.random.default_rng(1)
    for position in range(25):
        logits = (rng.standard_normal(61) * 3).astype(np.float32)
        if ties:
            logits = np.round(logits)  # many tokens share a logit; 0.31 and 0.2 then cut through such a group
        row = RowSampling(temperature=temperature, seed=5, position=position, **filters)  # type: ignore[arg-type]
        assert draw(logits, row) == naive_draw(logits, row)


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_frequencies_are_those_of_the_softmax(filters: dict[str, float]) -> None:
    logits = np.array([1.0, -0.5, 2.0, 0.0, 1.5, -3.0, 2.0, 0.5], np.float32)
    row = RowSampling(temperature=1.3, seed=11, **filters)  # type: ignore[arg-type]
    kept = naive_kept(logits, row)
    weights = {i: math.exp(float(logits[i]) / row.temperature) for i in kept}
    num_draws = 8000
    rows = tuple(replace(row, position=position) for position in range(num_draws))
    counts = Counter(result.token_id for result in sample(np.tile(logits, (num_draws, 1)), rows))
    assert set(counts) <= set(kept)
    expected = {i: num_draws * weight / sum(weights.values()) for i, weight in weights.items()}
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in kept)
    # 99.99 % quantiles of chi-square with 1..7 degrees of freedom.
    assert chi_square < [15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9][max(len(kept) - 2, 0)]


def test_pruning_by_the_bound_of_the_noise_is_exact() -> None:
    rng = np.random.default_rng(2)
    logits = np.full(6000, -9.0, np.float32) + rng.standard_normal(6000).astype(np.float32)
    logits[17] = 0.0  # alone against thousands far below it: either side wins about half of the time
    winners = []
    for position in range(60):
        row = RowSampling(temperature=1.0, seed=3, position=position)
        winner = draw(logits, row)
        assert winner == int((logits.astype(np.float64) + gumbel(3, position, np.arange(6000))).argmax())
        winners.append(winner == 17)
    assert 10 < sum(winners) < 50


def test_greedy_takes_the_highest_and_of_equals_the_first() -> None:
    assert draw(np.array([0.0, 3.0, 3.0, 1.0]), RowSampling()) == 1
    assert draw(np.array([0.0, 3.0, 3.0, 1.0]), RowSampling(temperature=1e-30, seed=9)) in (1, 2)


def test_a_tiny_temperature_is_greedy_and_a_high_one_is_not() -> None:
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    cold = {draw(logits, RowSampling(temperature=1e-38, top_p=0.9, position=i)) for i in range(20)}
    hot = {draw(logits, RowSampling(temperature=100.0, position=i)) for i in range(20)}
    assert cold == {int(logits.argmax())}
    assert len(hot) > 15


def test_penalties_match_a_loop() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        logits = (rng.standard_normal(40) * 2).astype(np.float32)
        prompt, output = rng.integers(0, 40, 12).tolist(), rng.integers(0, 40, 9).tolist()
        row = RowSampling(
            repetition_penalty=float(rng.uniform(0.5, 2.0)),
            presence_penalty=float(rng.uniform(-2, 2)),
            frequency_penalty=float(rng.uniform(-2, 2)),
            logit_bias=((3, 1.5), (20, -2.0)),
            banned=(7, 8),
            prompt_ids=prompt,
            output_ids=output,
        )
        want = [float(x) for x in logits]
        want[3] += 1.5
        want[20] -= 2.0
        for i in set(prompt) | set(output):
            want[i] = want[i] / row.repetition_penalty if want[i] > 0 else want[i] * row.repetition_penalty
        for i in output:
            want[i] -= row.frequency_penalty
        for i in set(output):
            want[i] -= row.presence_penalty
        for i in row.banned:
            want[i] = -math.inf
        assert draw(logits, row) == max(range(40), key=want.__getitem__)


def test_repetition_penalty_sees_the_prompt_and_the_others_do_not() -> None:
    logits = np.array([2.0, 1.9, 0.0], np.float32)
    assert draw(logits, RowSampling(repetition_penalty=1.5, prompt_ids=[0])) == 1
    assert draw(logits, RowSampling(presence_penalty=1.0, frequency_penalty=1.0, prompt_ids=[0])) == 0
    assert draw(logits, RowSampling(presence_penalty=1.0, output_ids=[0])) == 1


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.array([9.0, 1.0, 0.0], np.float32)
    for temperature in (0.0, 1.0, 50.0):
        row = RowSampling(temperature=temperature, banned=(0,), top_p=0.99 if temperature == 1.0 else 1.0)
        assert 0 not in {draw(logits, replace(row, position=i)) for i in range(30)}


def test_a_vanishing_repetition_penalty_stays_finite() -> None:
    logits = np.array([2.0, 3.0, -1.0], np.float32)
    row = RowSampling(temperature=1.0, top_p=0.5, repetition_penalty=1e-38, prompt_ids=[0, 2])
    assert draw(logits, row) == 0


def test_logprobs_are_of_the_unmodified_logits() -> None:
    logits = np.array([1.0, 2.0, 3.0, 3.0, -1.0], np.float32)
    row = RowSampling(temperature=0.0, logit_bias=((0, 100.0),), num_logprobs=3)
    [result] = sample(logits[None], (row,))
    log_sum = math.log(sum(math.exp(x) for x in logits))
    assert result.token_id == 0
    assert result.logprob == pytest.approx(1.0 - log_sum, abs=1e-6)
    assert [i for i, _ in result.top] == [2, 3, 1]
    assert [p for _, p in result.top] == pytest.approx([3.0 - log_sum, 3.0 - log_sum, 2.0 - log_sum], abs=1e-6)


def test_logprobs_only_where_asked_for() -> None:
    logits = np.zeros((2, 5), np.float32)
    without, chosen_only = sample(logits, (RowSampling(), RowSampling(num_logprobs=0)))
    assert math.isnan(without.logprob)
    assert without.top == ()
    assert chosen_only.logprob == pytest.approx(-math.log(5))
    assert chosen_only.top == ()


def test_a_sure_token_has_a_logprob_of_zero_not_above() -> None:
    logits = np.full((1, 50_000), -200.0, np.float32)
    logits[0, 3] = 200.0
    [result] = sample(logits, (RowSampling(num_logprobs=1),))
    assert result.logprob == 0.0
    assert result.top == ((3, 0.0),)


def test_scoring_returns_the_target() -> None:
    logits = np.array([[0.0, 1.0, 2.0]], np.float32)
    [result] = sample(logits, (RowSampling(target=0, temperature=1.0, num_logprobs=1),))
    assert result.token_id == 0
    assert result.logprob == pytest.approx(-math.log(1 + math.e + math.e**2), abs=1e-6)
    assert [i for i, _ in result.top] == [2]


@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not_touched(poison: float) -> None:
    logits = np.random.default_rng(4).standard_normal((3, 100)).astype(np.float32)
    rows = tuple(RowSampling(temperature=1.0, seed=i, num_logprobs=2) for i in range(3))
    clean = sample(logits, rows)
    logits[1, 50] = poison
    results = sample(logits, rows)
    assert [result.is_finite for result in results] == [True, False, True]
    assert (results[0], results[2]) == (clean[0], clean[2])


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((12, 300)) * 2).astype(np.float32)
    before = logits.copy()
    rows = tuple(
        RowSampling(temperature=0.3 * i, top_k=5 * (i % 3), top_p=1.0 - 0.05 * (i % 4), seed=7, position=40 + i)
        for i in range(12)
    )
    together = [result.token_id for result in sample(logits, rows)]
    alone = [draw(logits[i], rows[i]) for i in range(12)]
    backwards = [result.token_id for result in sample(logits[::-1].copy(), rows[::-1])][::-1]
    assert together == alone == backwards
    assert (logits == before).all()


def test_seed_and_position_choose_the_stream() -> None:
    logits = np.zeros(1000, np.float32)
    by_seed = {draw(logits, RowSampling(temperature=1.0, seed=seed)) for seed in (0, 1, 2**32, 2**64 - 1)}
    by_position = {draw(logits, RowSampling(temperature=1.0, position=position)) for position in range(4)}
    assert len(by_seed) == len(by_position) == 4


def test_small_changes_of_the_logits_seldom_change_the_token() -> None:
    rng = np.random.default_rng(6)
    logits = (rng.standard_normal((300, 2000)) * 3).astype(np.float32)
    rows = tuple(RowSampling(temperature=1.0, top_p=0.95, seed=1, position=i) for i in range(300))
    moved = logits + rng.uniform(-1e-4, 1e-4, logits.shape).astype(np.float32)
    pairs = zip(sample(logits, rows), sample(moved, rows), strict=True)
    assert sum(a.token_id == b.token_id for a, b in pairs) >= 298


def test_no_rows() -> None:
    assert sample(np.empty((0, 10), np.float32), ()) == []
