"""Native attention over KV blocks: against float64, and with the same bits whatever else is in the step.

The float64 reference reads the blocks back as they are stored (tests/support/kv_blocks.py), so that what is compared is
the attention alone: scores and sums in float32, about 1e-6 for numbers of size one. Blocks start as NaN, and only slots
that hold a token of the batch are ever written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from headrace.kernels.native.library import info
from headrace.kernels.native.single_ops import (
    KV_KINDS,
    AttentionBatch,
    AttentionOptions,
    Bits,
    KvBlocks,
    KvKind,
    attention,
    rope_kv,
)

from tests.support.activations import quantized
from tests.support.kv_blocks import read_kv_blocks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ISAS = info().usable
TOLERANCE = 4e-6  # absolute, of outputs of size one: some thousand float32 roundings, most of which cancel


@dataclass(frozen=True)
class Shape:
    num_kv_heads: int = 2
    group: int = 3  # query heads per KV head
    head_dim: int = 16
    block_size: int = 16
    kind: KvKind = "f16"

    @property
    def width(self) -> int:
        return self.num_kv_heads * self.group * self.head_dim


@dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence: its queries, keys and values, [num_tokens, ...]. The last num_queries are this step's."""

    q: F32
    k: F32
    v: F32
    num_queries: int

    @property
    def num_tokens(self) -> int:
        return len(self.k)

    def chunk(self, begin: int, end: int) -> Tokens:
        """The step that computes tokens begin..end, when those before are there already."""
        return Tokens(self.q[:end], self.k[:end], self.v[:end], end - begin)


def make_sequence(shape: Shape, num_tokens: int, num_queries: int, seed: int) -> Tokens:
    rng = np.random.default_rng([seed, num_tokens])
    kv_width = shape.num_kv_heads * shape.head_dim
    widths = (shape.width, kv_width, kv_width)
    q, k, v = (rng.standard_normal((num_tokens, width)).astype(np.float32) for width in widths)
    return Tokens(q, k, v, num_queries)


def make_sequences(shape: Shape, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Tokens]:
    """lengths: (num_tokens, num_queries) each."""
    return [make_sequence(shape, *pair, seed=seed + i) for i, pair in enumerate(lengths)]


# A decode row, prompts, chunks behind a prefix; lengths at, below and beyond multiples of 16 and of the 64 of a chunk.
MIXED = [(1, 1), (130, 1), (64, 64), (65, 2), (33, 33), (200, 30), (128, 7), (129, 1), (17, 5)]


@dataclass(frozen=True, eq=False)
class Step:
    q: F32
    kv: KvBlocks
    batch: AttentionBatch

    def run(self, options: AttentionOptions, isa: str | None = None) -> F32:
        return attention(self.q, self.kv, self.batch, options, isa=isa).out


def make_step(shape: Shape, sequences: Sequence[Tokens], seed: int = 0) -> Step:
    """Blocks in random order, some of them unused; the tables' padding names an unused block."""
    size = shape.block_size
    num_blocks = [-(-sequence.num_tokens // size) for sequence in sequences]
    order = np.random.default_rng([7, seed]).permutation(sum(num_blocks) + 3).astype(np.int32)
    tables = np.full((len(sequences), max(num_blocks) + 2), order[-1], np.int32)
    kv = KvBlocks.empty(shape.kind, shape.num_kv_heads, shape.head_dim, size, len(order))
    taken = 0
    for table, count, sequence in zip(tables, num_blocks, sequences, strict=True):
        table[:count] = order[taken : taken + count]
        taken += count
        at = np.arange(sequence.num_tokens)
        rope_kv(np.zeros_like(sequence.k), sequence.k, sequence.v, table[at // size] * size + at % size, kv)
    num_queries = [sequence.num_queries for sequence in sequences]
    cu_seqlens_q = np.concatenate([[0], np.cumsum(num_queries)]).astype(np.int32)
    seq_lens = np.array([sequence.num_tokens for sequence in sequences], np.int32)
    q = np.concatenate([sequence.q[sequence.num_tokens - sequence.num_queries :] for sequence in sequences])
    return Step(q, kv, AttentionBatch(cu_seqlens_q, seq_lens, tables))


def reference(shape: Shape, step: Step, options: AttentionOptions) -> F64:
    contents = read_kv_blocks(step.kv)
    outs = []
    for i, length in enumerate(step.batch.seq_lens):
        at = np.arange(length)
        slots = step.batch.block_tables[i][at // shape.block_size] * shape.block_size + at % shape.block_size
        k, v = (np.repeat(array[slots], shape.group, axis=1) for array in (contents.k, contents.v))
        begin, end = step.batch.cu_seqlens_q[i : i + 2]
        q = step.q[begin:end].astype(np.float64).reshape(end - begin, -1, shape.head_dim)
        scores = np.einsum("qhd,khd->hqk", q, k) * options.scale
        if options.soft_cap:
            scores = options.soft_cap * np.tanh(scores / options.soft_cap)
        positions = np.arange(length - len(q), length)[:, None]
        is_seen = at <= positions
        if options.window:
            is_seen &= at > positions - options.window
        scores = np.where(is_seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        outs.append(np.einsum("hqk,khd->qhd", weights, v).reshape(len(q), -1))
    return np.concatenate(outs)


def options_for(shape: Shape, **changes: float) -> AttentionOptions:
    return replace(AttentionOptions(shape.head_dim**-0.5), **changes)


@pytest.mark.parametrize("kind", KV_KINDS)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (8, 16), (16, 32), (24, 48), (80, 16), (128, 16)])
def test_mixed_batches_match_float64(head_dim: int, block_size: int, kind: KvKind) -> None:
    shape = Shape(head_dim=head_dim, block_size=block_size, kind=kind)
    step = make_step(shape, make_sequences(shape, MIXED))
    options = options_for(shape)
    np.testing.assert_allclose(step.run(options), reference(shape, step, options), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("block_size", [1, 8, 16, 32, 48, 64, 256])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_any_block_size(head_dim: int, block_size: int) -> None:
    shape = Shape(head_dim=head_dim, block_size=block_size)
    sequences = make_sequences(shape, MIXED)
    step, options = make_step(shape, sequences), options_for(shape)
    out = step.run(options)
    np.testing.assert_allclose(out, reference(shape, step, options), rtol=0, atol=TOLERANCE)
    usual = make_step(replace(shape, block_size=16), sequences)
    assert np.array_equal(usual.run(options), out)  # not promised, but true: no copy rounds


@pytest.mark.parametrize(("num_kv_heads", "group"), [(3, 1), (1, 3), (2, 4), (1, 8), (2, 5), (1, 7), (1, 60)])
def test_grouped_heads(num_kv_heads: int, group: int) -> None:
    shape = Shape(num_kv_heads, group)
    step = make_step(shape, make_sequences(shape, MIXED[:6]))
    options = options_for(shape, num_threads=2)
    np.testing.assert_allclose(step.run(options), reference(shape, step, options), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 100, 1000])
def test_windows_and_soft_caps(window: int, soft_cap: float) -> None:
    for block_size in (16, 8):
        shape = Shape(block_size=block_size)
        step = make_step(shape, make_sequences(shape, MIXED))
        options = options_for(shape, window=window, soft_cap=soft_cap)
        np.testing.assert_allclose(step.run(options), reference(shape, step, options), rtol=0, atol=TOLERANCE)


def test_scores_of_any_size() -> None:
    """Weights that underflow, and one that takes all."""
    shape = Shape(kind="f32")
    for scale in (0.0, 1e-20, 30.0, 300.0):
        step = make_step(shape, make_sequences(shape, MIXED))
        options = options_for(shape, scale=scale)
        want = reference(shape, step, options)
        # A score of size s is off by some 1e-7 s, and a weight by that much of itself.
        np.testing.assert_allclose(step.run(options), want, rtol=0, atol=TOLERANCE * max(1.0, scale))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KV_KINDS)
def test_the_same_bits_on_every_instruction_set_and_thread_count(kind: KvKind, isa: str) -> None:
    for head_dim, block_size, group, window, soft_cap in (
        (64, 16, 3, 0, 0.0),
        (16, 16, 4, 40, 20.0),
        (8, 16, 1, 0, 0.0),
        (48, 32, 5, 70, 0.0),
        (24, 1, 2, 0, 10.0),
    ):
        shape = Shape(2, group, head_dim, block_size, kind)
        step = make_step(shape, make_sequences(shape, [(70, 9), (1, 1), (150, 1), (33, 33)]))
        options = options_for(shape, window=window, soft_cap=soft_cap)
        want = step.run(options, "generic")
        for num_threads in (1, 2, 5):
            assert np.array_equal(step.run(replace(options, num_threads=num_threads), isa), want)


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("kind", KV_KINDS)
def test_a_sequence_alone_gives_the_bits_that_it_gives_among_others(kind: KvKind, window: int) -> None:
    shape = Shape(head_dim=32, kind=kind)
    sequences = make_sequences(shape, MIXED)
    options = options_for(shape, window=window, num_threads=2)
    together = make_step(shape, sequences).run(options)
    row = 0
    for i, sequence in enumerate(sequences):
        alone = make_step(shape, [sequence], seed=i + 1).run(options)
        assert np.array_equal(alone, together[row : row + sequence.num_queries])
        row += sequence.num_queries


@pytest.mark.parametrize("shape", [Shape(), Shape(1, 4, 64), Shape(2, 1, 24, 8), Shape(1, 7, 32, 48, "int8")])
@pytest.mark.parametrize("window", [0, 30])
def test_chunked_prefill_and_decode_give_the_bits_of_the_whole_prompt(shape: Shape, window: int) -> None:
    sequence = make_sequence(shape, 200, 200, seed=5)
    options = options_for(shape, window=window)
    whole = make_step(shape, [sequence]).run(options)
    rng = np.random.default_rng(6)
    for trial in range(6):
        cuts = np.unique(np.concatenate([[0, 200], rng.integers(1, 200, rng.integers(1, 9))]))
        for begin, end in pairwise(cuts):
            neighbours = make_sequences(shape, [(int(n), 1) for n in rng.integers(1, 150, trial)], seed=trial)
            step = make_step(shape, [*neighbours, sequence.chunk(int(begin), int(end))], seed=trial)
            out = step.run(replace(options, num_threads=1 + trial % 3))
            assert np.array_equal(out[len(neighbours) :], whole[begin:end]), (cuts, begin, trial)


@pytest.mark.parametrize("shape", [Shape(1, 3, 64), Shape(3, 3, 64), Shape(1, 1, 8, 8), Shape(2, 20)])
def test_long_contexts_are_shared_out_and_give_the_same_bits(shape: Shape) -> None:
    sequences = make_sequences(shape, [(1500, 1), (700, 6)])
    step, options = make_step(shape, sequences), options_for(shape, window=0)
    one = attention(step.q, step.kv, step.batch, options)
    for num_threads in (2, 3, 8):
        several = attention(step.q, step.kv, step.batch, replace(options, num_threads=num_threads, repeats=3))
        assert several.num_items > one.num_items
        assert np.array_equal(several.out, one.out)
    np.testing.assert_allclose(one.out, reference(shape, step, options), rtol=0, atol=TOLERANCE)


def test_one_stream_keeps_two_threads_busy() -> None:
    """Three KV heads on two threads are 2 to 1; cut into chunks they are not. The items are counted, not timed."""
    shape = Shape(3, 3, 64)
    step = make_step(shape, make_sequences(shape, [(256, 1)]))
    assert attention(step.q, step.kv, step.batch, options_for(shape, num_threads=2)).num_items >= 8


@pytest.mark.parametrize("kind", KV_KINDS)
def test_nan_of_one_sequence_stays_in_it(kind: KvKind) -> None:
    """And reaches no query that stands before it, though rows are computed several at a time."""
    shape = Shape(kind=kind)
    sequences = make_sequences(shape, [(70, 3), (90, 40), (100, 1)])  # 40 queries at positions 50 to 89
    options = options_for(shape, num_threads=2)
    clean = make_step(shape, sequences).run(options)
    for name, position in (("k", 60), ("v", 60), ("v", 61), ("v", 63), ("v", 64)):
        poisoned = getattr(sequences[1], name).copy()
        poisoned[position, 0] = np.nan  # of KV head 0
        step = make_step(shape, [sequences[0], replace(sequences[1], **{name: poisoned}), sequences[2]])
        out = step.run(options)
        heads, clean_heads = (array.reshape(len(out), shape.num_kv_heads, -1) for array in (out, clean))
        is_hit = np.isnan(heads).any(-1)
        assert is_hit[3 + position - 50 : 43, 0].all()
        assert is_hit.sum() == 90 - position
        assert np.array_equal(heads[~is_hit], clean_heads[~is_hit])


def test_infinite_and_nan_queries_show() -> None:
    shape = Shape()
    for bad in (np.nan, np.inf):
        step = make_step(shape, make_sequences(shape, [(70, 3)]))
        step.q[1, 0] = bad
        out = step.run(options_for(shape)).reshape(3, 6, 16)
        assert np.isnan(out[1, 0]).all()
        assert np.isfinite(out[[0, 2]]).all()
        assert np.isfinite(out[1, 1:]).all()


@pytest.mark.parametrize("kind", KV_KINDS)
def test_what_freed_blocks_hold_does_not_matter(kind: KvKind) -> None:
    """NaN, infinities or numbers in every slot that is not the batch's own: the same bits."""
    for shape in (Shape(kind=kind), Shape(1, 3, 64, 32, kind), Shape(2, 2, 24, 8, kind)):
        sequences = make_sequences(shape, [(1, 1), (19, 19), (70, 5), (65, 1)])
        options = options_for(shape, num_threads=2)
        step = make_step(shape, sequences)
        want = step.run(options)
        assert np.isfinite(want).all()
        is_own = read_own_bytes(shape, sequences)
        for filler in (0, 0x3C, 0x7B, 0x7C, 0x80, 0xFC):
            data = step.kv.copy()
            data.data[~is_own] = filler
            assert np.array_equal(attention(step.q, data, step.batch, options).out, want)


def read_own_bytes(shape: Shape, sequences: Sequence[Tokens]) -> npt.NDArray[np.bool_]:
    """Which bytes of make_step's blocks the sequences' tokens have written: all zeros leave none at 255."""
    zeros = [Tokens(s.q, np.zeros_like(s.k), np.zeros_like(s.v), s.num_queries) for s in sequences]
    return make_step(shape, zeros).kv.data != 255


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
def test_quantised_output_is_the_output_quantised(bits: Bits, isa: str) -> None:
    for head_dim in (32, 64):
        shape = Shape(2, 3, head_dim)
        step = make_step(shape, make_sequences(shape, [(70, 9), (300, 1), (33, 33)]))
        options = options_for(shape, num_threads=2)
        got = attention(step.q, step.kv, step.batch, options, bits=bits, isa=isa)
        assert np.array_equal(got.out, step.run(options))
        assert got.quantized is not None
        assert np.array_equal(got.quantized, quantized(got.out, bits))


def test_arguments_that_do_not_fit_are_refused() -> None:
    shape = Shape()
    step = make_step(shape, make_sequences(shape, [(20, 2), (3, 3)]))
    options = options_for(shape)
    q, kv, batch = step.q, step.kv, step.batch

    def refuse(match: str, **changes: object) -> None:
        arguments = {"q": q, "kv": kv, "batch": batch, "options": options, **changes}
        with pytest.raises(ValueError, match=match):
            attention(**arguments)  # type: ignore[arg-type]

    refuse("there is no block 99", batch=replace(batch, block_tables=np.full_like(batch.block_tables, 99)))
    refuse("too short", batch=replace(batch, block_tables=batch.block_tables[:, :1]))
    refuse("has 2 rows but 1 tokens", batch=replace(batch, seq_lens=np.array([1, 3], np.int32)))
    refuse("falls", batch=replace(batch, cu_seqlens_q=np.array([0, 6, 5], np.int32)))
    refuse("different batches", q=q[:4])
    refuse("no output|32", bits=8)
    refuse("num_threads", options=replace(options, num_threads=0))
    refuse("window is -1", options=replace(options, window=-1))
    refuse("do not share", q=np.zeros((5, 3 * 16), np.float32))
    refuse("cannot run here", isa="sse1")
