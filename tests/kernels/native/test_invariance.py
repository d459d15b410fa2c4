"""A row's numbers never depend on who else is in the batch: logits are equal to the bit, whatever the company.

Every trial takes a random sequence and computes it twice: alone in one piece on one thread, with the fastest kernels or
the plainest; and cut into random chunks beside random others on scattered blocks, with what the trial drew of threads,
instruction set, block size, preemption (the blocks are freed, poisoned with NaN, and the sequence starts again) and
prefix hits (it starts behind blocks that another sequence wrote).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.kernels.native import library
from headrace.kernels.native.executor import KV_DTYPES, NativeExecutor, PackedWeights, pack
from headrace.kernels.native.fuse import fuse
from headrace.kernels.native.ops import form_of
from headrace.kernels.program import StepProgram
from headrace.models.load import load_model

from tests.conftest import TinyModels
from tests.support.stepping import step_batch

MODELS = (("llama", "Q4_1"), ("gemma3-capped", "Q8_0"), ("qwen3", "Q4_0"), ("mistral", "Q4_1"), ("qwen2", "F32"))
IS_SANITIZED = "san" in os.environ.get("LD_PRELOAD", "")
NUM_TRIALS = 20 if IS_SANITIZED else 200  # a sanitizer takes 15 times as long
NUM_BLOCKS = 96
MAX_TOKENS = 128
LONGEST = 90


@dataclass(frozen=True, eq=False)
class Packed:
    """A model, packed once for all trials."""

    program: StepProgram
    weights: PackedWeights

    def open(self, **options: Any) -> NativeExecutor:
        options = {"num_blocks": NUM_BLOCKS, "max_num_batched_tokens": MAX_TOKENS, **options}
        return NativeExecutor(self.program, self.weights, **options)


def pack_model(path: Path) -> Packed:
    model = load_model(path)
    forms = {name: form_of(weight) for name, weight in model.weights.items() if len(weight.shape) == 2}
    return Packed(model.program, pack(fuse(model.program, forms), forms, model.weights))


@pytest.fixture(scope="module")
def packed(tiny_models: TinyModels) -> Callable[[str, str], Packed]:
    return functools.cache(lambda architecture, quantization: pack_model(tiny_models.gguf(architecture, quantization)))


class Blocks:
    """Hands out random free blocks; what is given back is poisoned."""

    def __init__(self, executor: NativeExecutor, block_size: int, rng: np.random.Generator) -> None:
        self._executor, self.size = executor, block_size
        self._free = rng.permutation(NUM_BLOCKS).tolist()

    def grow(self, table: list[int], num_tokens: int) -> None:
        while len(table) * self.size < num_tokens:
            table.append(self._free.pop())

    def free(self, table: list[int]) -> None:
        for block in table:
            self._executor.poison(block)
        self._free[:0] = table
        table.clear()


def random_chunks(rng: np.random.Generator, begin: int, end: int) -> Iterator[tuple[int, int]]:
    while begin < end:
        size = min(int(rng.choice([1, 1, 2, 3, 5, 8, 16, 33, 64])), end - begin)
        yield begin, begin + size
        begin += size


def in_company(
    executor: NativeExecutor, tokens: list[int], vocab: int, block_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Logits of every row of `tokens`, computed as the random numbers will have it."""
    blocks = Blocks(executor, block_size, rng)
    others = [rng.integers(0, vocab, rng.integers(1, 40)).tolist() for _ in range(rng.integers(0, 5))]
    state = [(other, [0], list[int]()) for other in others]  # tokens, number computed, block table
    table: list[int] = []
    logits: dict[int, np.ndarray] = {}

    def step(begin: int, end: int) -> None:
        blocks.grow(table, end)
        pieces = [(tokens[begin:end], begin, list(table))]
        room = MAX_TOKENS - (end - begin)
        for other, done, other_table in state:
            size = min(int(rng.choice([0, 1, 1, 4, 17])), len(other) - done[0], room)
            if size <= 0:
                continue
            blocks.grow(other_table, done[0] + size)
            pieces.append((other[done[0] : done[0] + size], done[0], list(other_table)))
            done[0] += size
            room -= size
        order = rng.permutation(len(pieces))
        first_row = sum(len(pieces[i][0]) for i in order[: int(np.flatnonzero(order == 0)[0])])
        rows = executor.forward(step_batch([pieces[i] for i in order], block_size))[first_row:]
        for position in range(begin, end):
            assert position not in logits or np.array_equal(logits[position], rows[position - begin])
            logits[position] = rows[position - begin]

    if rng.random() < 0.4 and len(tokens) > 1:  # preempted half-way
        stop = int(rng.integers(1, len(tokens)))
        for begin, end in random_chunks(rng, 0, stop):
            step(begin, end)
        blocks.free(table)
    start = 0
    if rng.random() < 0.4 and len(tokens) > block_size:  # the first blocks are another's
        start = int(rng.integers(1, (len(tokens) - 1) // block_size + 1)) * block_size
        blocks.grow(table, start)
        prefix = executor.forward(step_batch([(tokens[:start], 0, list(table))], block_size))
        logits.update(dict(enumerate(prefix)))
    for begin, end in random_chunks(rng, start, len(tokens)):
        step(begin, end)
    return np.stack([logits[position] for position in range(len(tokens))])


def run_trial(model: Packed, seed: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    rng = np.random.default_rng(seed)
    vocab = model.program.vocab_size
    kv_dtype = KV_DTYPES[seed // len(MODELS) % len(KV_DTYPES)]
    tokens = rng.integers(0, vocab, rng.integers(1, LONGEST)).tolist()
    usable = library.info().usable
    monkeypatch.setenv(library.ISA_VARIABLE, usable[seed % 2 * (len(usable) - 1)])  # the fastest and plain C++ in turn
    reference = model.open(block_size=16, num_threads=1, kv_dtype=kv_dtype)
    want = reference.forward(step_batch([(tokens, 0, list(range(len(tokens) // 16 + 1)))], 16))
    reference.close()
    monkeypatch.setenv(library.ISA_VARIABLE, str(rng.choice(usable)))
    block_size = int(rng.choice([4, 16, 32]))
    executor = model.open(block_size=block_size, num_threads=int(rng.integers(1, 5)), kv_dtype=kv_dtype, **options)
    try:
        got = in_company(executor, tokens, vocab, block_size, rng)
    finally:
        executor.close()
    assert np.isfinite(want).all()
    assert np.array_equal(got, want), (seed, executor.name, kv_dtype, block_size, np.abs(got - want).max())


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_logits_are_equal_to_the_bit(
    part: int, packed: Callable[[str, str], Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(part, NUM_TRIALS, 10):
        run_trial(packed(*MODELS[seed % len(MODELS)]), seed, monkeypatch)


def test_control_a_split_that_depends_on_rows_is_noticed(
    packed: Callable[[str, str], Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The executor's planted fault splits the sums of dense products in two where there is more than one row."""
    seeds = range(4, NUM_TRIALS, len(MODELS))  # those of the dense model

    def run_all() -> None:
        for seed in seeds:
            run_trial(packed(*MODELS[seed % len(MODELS)]), seed, monkeypatch, test_fault=True)

    with pytest.raises(AssertionError):
        run_all()


@pytest.mark.slow
def test_the_default_model(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pack_model(smollm2_path)
    fast = [name for name in library.info().usable if name != "generic"] or ["generic"]
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, model.program.vocab_size, 72).tolist()
    monkeypatch.setenv(library.ISA_VARIABLE, fast[0])
    reference = model.open(block_size=16, num_threads=1)
    want = reference.forward(step_batch([(tokens, 0, [5, 4, 3, 2, 1])], 16))
    reference.close()
    for trial in range(4):
        monkeypatch.setenv(library.ISA_VARIABLE, fast[trial % len(fast)])
        executor = model.open(block_size=16, num_threads=1 + trial % 2)
        got = in_company(executor, tokens, model.program.vocab_size, 16, np.random.default_rng(trial))
        executor.close()
        assert np.array_equal(got, want), (trial, executor.name)
