"""The native sampling op against the numpy one that defines it, on every instruction set that this CPU runs."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from headrace.kernels import sample as reference
from headrace.kernels.batch import RowResult, RowSampling
from headrace.kernels.native.library import info
from headrace.kernels.native.sampling import encode, run, sample
from headrace.kernels.philox import gumbel
from hypothesis import given, settings
from hypothesis import strategies as st

ISAS = info().usable
NAN = float("nan")


def one(logits: np.ndarray, row: RowSampling, isa: str | None = None) -> RowResult:
    [result] = sample(logits[None].astype(np.float32), (row,), isa)
    return result


def defined(logits: np.ndarray, row: RowSampling) -> RowResult:
    [result] = reference.sample(logits[None].astype(np.float32), (row,))
    return result


def assert_means_the_same(logits: np.ndarray, row: RowSampling, got: RowResult) -> None:
    """`got` is what the reference says. Two things may differ in the last place: logarithms, so scores closer than
    1e-12 are a tie, and sums of weights, so top_p is as good as anything within 1e-6 of it."""
    want = defined(logits, row)
    assert got.is_finite == want.is_finite
    if got.token_id != want.token_id:
        near = [defined(logits, replace(row, top_p=row.top_p * (1 + d))).token_id for d in (-1e-6, 1e-6)]
        assert got.token_id in near or is_tie(logits, row, got.token_id, want.token_id), (row, got, want)
        row = replace(row, target=got.token_id)
        want = replace(defined(logits, row), token_id=got.token_id)
    assert (math.isnan(got.logprob) and math.isnan(want.logprob)) or abs(got.logprob - want.logprob) <= 1e-6
    assert [i for i, _ in got.top] == [i for i, _ in want.top]
    assert np.allclose([p for _, p in got.top], [p for _, p in want.top], rtol=0, atol=1e-6)


def is_tie(logits: np.ndarray, row: RowSampling, a: int, b: int) -> bool:
    ids = np.array([a, b])
    adjusted = reference._adjust(logits.astype(np.float32), row)[ids].astype(np.float64)
    scores = adjusted / row.temperature + gumbel(row.seed, row.position, ids)
    return bool(abs(scores[0] - scores[1]) < 1e-12)


def random_row(rng: np.random.Generator, vocab_size: int) -> RowSampling:
    """Everything at once, each part with some probability."""

    def maybe(probability: float, value: object, otherwise: object) -> object:
        return value if rng.random() < probability else otherwise

    def ids(most: int) -> list[int]:
        return rng.integers(0, vocab_size, rng.integers(0, most + 1)).tolist()

    num_banned = int(rng.integers(0, min(vocab_size, 4)))
    fields: dict[str, object] = {
        "target": maybe(0.1, int(rng.integers(vocab_size)), -1),
        "temperature": maybe(0.8, float(10 ** rng.uniform(-2, 1.5)), 0.0),
        "top_k": maybe(0.4, int(rng.integers(1, 2 * vocab_size + 1)), 0),
        "top_p": maybe(0.5, float(rng.uniform(0, 1)), 1.0),
        "min_p": maybe(0.3, float(rng.uniform(0, 1) ** 4), 0.0),
        "repetition_penalty": maybe(0.2, float(rng.uniform(0.3, 3)), 1.0),
        "presence_penalty": maybe(0.2, float(rng.uniform(-2, 2)), 0.0),
        "frequency_penalty": maybe(0.2, float(rng.uniform(-2, 2)), 0.0),
        "logit_bias": maybe(0.2, tuple((i, float(rng.uniform(-9, 9))) for i in ids(4)), ()),
        "banned": maybe(0.2, tuple(rng.choice(vocab_size, num_banned, replace=False).tolist()), ()),
        "num_logprobs": int(maybe(0.4, int(rng.integers(0, 25)), -1)),  # type: ignore[call-overload]
        "prompt_ids": ids(30),
        "output_ids": ids(20),
        "seed": int(rng.integers(0, 2**64, dtype=np.uint64)),
        "position": int(rng.integers(0, 2**20)),
    }
    return RowSampling(**fields)  # type: ignore[arg-type]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    vocab_size=st.integers(1, 700),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 3.0, 30.0, 1e30]),
    is_rounded=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_random_rows_mean_what_the_reference_says(vocab_size: int, spread: float, is_rounded: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((8, vocab_size)) * spread).astype(np.float32)
    if is_rounded:  # many ties: filters then cut through groups of equal logits
        logits = np.round(logits)
    before = logits.copy()
    rows = [random_row(rng, vocab_size) for _ in range(len(logits))]
    results = sample(logits, rows)
    for i, row in enumerate(rows):
        assert_means_the_same(logits[i], row, results[i])
    assert (logits == before).all()
    assert [repr(result) for result in results] == [repr(one(logits[i], row)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 63, 64, 65, 1023, 49_152])
def test_vocabularies_of_all_sizes(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    for spread in (0.5, 3.0):
        logits = (rng.standard_normal((40, vocab_size)) * spread).astype(np.float32)
        rows = [random_row(rng, vocab_size) for _ in range(len(logits))]
        for i, result in enumerate(sample(logits, rows)):
            assert_means_the_same(logits[i], rows[i], result)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_bits(isa: str) -> None:
    rng = np.random.default_rng(1)
    for vocab_size in (1, 15, 61, 130, 4097, 49_152):
        logits = (rng.standard_normal((60, vocab_size)) * 3).astype(np.float32)
        logits[::7] = np.round(logits[::7])
        rows = [random_row(rng, vocab_size) for _ in range(len(logits))]
        assert repr(sample(logits, rows, isa)) == repr(sample(logits, rows, "generic"))


FILTERS: list[dict[str, float]] = [
    {},
    {"top_k": 3},
    {"top_k": 10_000},
    {"top_p": 0.5},
    {"top_p": 0.0},
    {"top_p": 0.999999},
    {"min_p": 1.0},
    {"min_p": 1e-300},
    {"top_k": 200, "top_p": 0.9, "min_p": 0.01},
]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [1e-38, 1e-6, 1.0, 1e30])
def test_equal_logits_and_extreme_temperatures(filters: dict[str, float], temperature: float) -> None:
    rng = np.random.default_rng(2)
    shapes = [np.zeros(1000), np.full(1000, -7.5), np.repeat([1.0, 2.0], 500), rng.standard_normal(1000)]
    shapes.append(np.where(np.arange(1000) == 700, 3e38, -3e38))
    for logits in shapes:
        for position in range(6):
            row = RowSampling(temperature=temperature, seed=3, position=position, **filters)  # type: ignore[arg-type]
            assert_means_the_same(logits, row, one(logits, row))


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros(300)
    logits[[70, 5 * 16 + 3, 250]] = 4.0
    assert one(logits, RowSampling()).token_id == 70
    assert one(np.array([-0.0, 0.0]), RowSampling()).token_id == 0
    assert [i for i, _ in one(logits, RowSampling(num_logprobs=5)).top] == [70, 83, 250, 0, 1]
    drawn = {one(logits, RowSampling(temperature=1e9, top_k=4, position=i)).token_id for i in range(200)}
    assert drawn == {70, 83, 250, 0}


def test_banned_tokens_are_never_drawn() -> None:
    logits = np.random.default_rng(3).standard_normal(200)
    for temperature in (0.0, 1.0, 50.0):
        for filters in FILTERS:
            banned = tuple(i for i in range(200) if i != 77)
            row = RowSampling(temperature=temperature, banned=banned, **filters)  # type: ignore[arg-type]
            assert one(logits, row).token_id == 77
    assert one(logits, RowSampling(temperature=1.0, banned=tuple(range(200)))).token_id == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("poison", [NAN, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not_touched(poison: float, isa: str) -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((3, 200)).astype(np.float32)
    rows = tuple(RowSampling(temperature=1.0, seed=i, num_logprobs=2) for i in range(3))
    clean = sample(logits, rows, isa)
    for place in range(200):
        poisoned = logits.copy()
        poisoned[1, place] = poison
        results = sample(poisoned, rows, isa)
        assert [result.is_finite for result in results] == [True, False, True]
        assert (results[0], results[2]) == (clean[0], clean[2])
        assert math.isnan(results[1].logprob)
        assert results[1].top == ()


def test_penalties_leave_no_trace() -> None:
    """The table that counts tokens is undone after each row: penalised rows before change nothing."""
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((1, 90)).astype(np.float32)
    ids = [3, 3, 3, 89, 0, 3, 89]
    row = RowSampling(
        repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.1, prompt_ids=ids, output_ids=ids
    )
    first = sample(logits, (replace(row, num_logprobs=3),))
    for _ in range(3):
        assert sample(logits, (replace(row, num_logprobs=3),)) == first
    want = logits[0].copy()
    want[3], want[89], want[0] = (want[i] / 1.7 if want[i] > 0 else want[i] * 1.7 for i in (3, 89, 0))
    for i, count in ((3, 4), (89, 2), (0, 1)):
        want[i] -= 0.3 * count + 0.1
    assert first[0].token_id == int(want.argmax())


def test_a_vanishing_repetition_penalty_stays_finite() -> None:
    logits = np.array([2.0, 3.0, -1.0])
    row = RowSampling(temperature=1.0, top_p=0.5, repetition_penalty=1e-38, prompt_ids=[0, 2])
    assert one(logits, row).token_id == 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_frequencies_are_those_of_the_softmax(filters: dict[str, float], isa: str) -> None:
    logits = np.array([1.0, -0.5, 2.0, 0.0, 1.5, -3.0, 2.0, 0.5], np.float32)
    kept = {"": range(8), "top_k": (2, 6, 4), "top_p": (2, 6, 4, 0), "min_p": (2, 6, 4, 0, 3, 7)}
    row = RowSampling(temperature=1.3, seed=11, **filters)  # type: ignore[arg-type]
    weights = {i: math.exp(float(logits[i]) / row.temperature) for i in kept["".join(filters)]}
    num_draws = 20_000
    rows = tuple(replace(row, position=position) for position in range(num_draws))
    counts = Counter(result.token_id for result in sample(np.tile(logits, (num_draws, 1)), rows, isa))
    assert set(counts) <= set(weights)
    expected = {i: num_draws * weight / sum(weights.values()) for i, weight in weights.items()}
    chi_square = sum((counts[i] - expected[i]) ** 2 / expected[i] for i in weights)
    # 99.99 % quantiles of chi-square with 1..7 degrees of freedom.
    assert chi_square < [15.1, 18.4, 21.1, 23.5, 25.7, 27.9, 29.9][len(weights) - 2]


def test_the_tail_of_a_large_vocabulary_is_drawn_as_often_as_it_should_be() -> None:
    """Groups far below the best are left out by a bound: exactly, or the many unlikely tokens would lose."""
    logits = np.full(6000, -9.0, np.float32) + np.random.default_rng(2).standard_normal(6000).astype(np.float32)
    logits[17] = 0.0
    rows = tuple(RowSampling(temperature=1.0, seed=3, position=i) for i in range(400))
    tokens = [result.token_id for result in sample(np.tile(logits, (400, 1)), rows)]
    noise = [gumbel(3, i, np.arange(6000)) for i in range(400)]
    assert tokens == [int((logits.astype(np.float64) + noise[i]).argmax()) for i in range(400)]
    assert 100 < sum(token == 17 for token in tokens) < 300


BAD_ROWS = [
    (RowSampling(target=10), "row 1: the target 10 is not in the vocabulary"),
    (RowSampling(temperature=-1.0), "row 1: the temperature"),
    (RowSampling(temperature=NAN), "row 1: the temperature"),
    (RowSampling(logit_bias=((-1, 1.0),)), "row 1: bias ids: -1 is not in the vocabulary"),
    (RowSampling(banned=(3, 10)), "row 1: banned ids: 10"),
    (RowSampling(repetition_penalty=2.0, prompt_ids=[10]), "row 1: prompt ids: 10"),
    (RowSampling(presence_penalty=2.0, output_ids=[2, 2**31 - 1]), "row 1: output ids: 2147483647"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS, ids=[message for _, message in BAD_ROWS])
def test_rows_that_point_out_of_the_vocabulary_are_refused(row: RowSampling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(np.zeros((2, 10), np.float32), (RowSampling(), row))


def test_logits_and_rows_must_fit() -> None:
    with pytest.raises(ValueError, match="1 rows of sampling for logits float32"):
        sample(np.zeros((2, 10), np.float32), (RowSampling(),))
    with pytest.raises(ValueError, match="float64"):
        sample(np.zeros((1, 10)), (RowSampling(),))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sse9 cannot run here"):
        sample(np.zeros((1, 10), np.float32), (RowSampling(),), "sse9")
    assert sample(np.empty((0, 10), np.float32), ()) == []


def test_the_c_function_refuses_what_python_never_sends() -> None:
    arrays = encode([RowSampling(num_logprobs=2, banned=(1,))], 10)
    logits = np.zeros((1, 10), np.float32)
    run(logits, arrays)
    empty = np.empty(0, np.int32)
    for broken in (replace(arrays, token_ids=empty), replace(arrays, top_ids=empty)):
        with pytest.raises(ValueError, match=r"row 0: the .* are out of range"):
            run(logits, broken)
    for field in ("bias_ids", "num_bias", "banned_ids", "num_banned", "prompt_ids", "num_output", "top"):
        for value in (-1, 2, 2**31 - 1):
            rows = arrays.rows.copy()
            rows[field] = value
            with pytest.raises(ValueError, match=r"row 0: the .* are out of range"):
                run(logits, replace(arrays, rows=rows))
