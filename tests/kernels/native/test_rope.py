"""The native rotary embedding and the write into KV blocks, against float64 and numpy's conversions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from headrace.kernels.native.library import info
from headrace.kernels.native.single_ops import KV_KINDS, KvBlocks, KvKind, rope_kv, rope_table

from tests.support.kv_blocks import read_kv_blocks

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
ISAS = info().usable
HEAD_DIMS = [8, 16, 24, 40, 64, 80, 128, 256]


def inverse_frequencies(head_dim: int) -> F32:
    return (1e5 ** -(np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)


def random(rows: int, width: int, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 3).astype(np.float32)


def turned(x: F32, positions: npt.NDArray[np.int32], head_dim: int) -> F64:
    half = head_dim // 2
    angles = (positions.astype(np.float32)[:, None] * inverse_frequencies(head_dim)).astype(np.float64)[:, None]
    pairs = x.astype(np.float64).reshape(len(x), -1, head_dim)
    first, second = pairs[..., :half], pairs[..., half:]
    both = (first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles))
    return np.concatenate(both, axis=-1).reshape(x.shape)


def normed(x: F32, weight: F32, eps: float) -> F32:
    heads = x.astype(np.float64).reshape(len(x), -1, len(weight))
    scaled = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + eps) * weight
    return scaled.reshape(x.shape).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
def test_the_table_is_cos_and_sin_of_angles_rounded_to_float32(isa: str) -> None:
    positions = np.array([0, 1, 2, 1000, 8191, 131071, 1 << 24], np.int32)
    inv_freq = inverse_frequencies(64)
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    want = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    np.testing.assert_allclose(rope_table(inv_freq, positions, isa=isa), want, rtol=1.2e-7)
    scaled = rope_table(inv_freq, positions, 1.5, isa=isa)
    np.testing.assert_allclose(scaled, want * np.float32(1.5), rtol=2.4e-7)
    assert np.array_equal(rope_table(inv_freq, positions, isa=isa), rope_table(inv_freq, positions, isa="generic"))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("has_norms", [False, True])
def test_queries_and_keys_are_normed_and_turned(has_norms: bool, head_dim: int) -> None:
    positions = np.array([0, 5, 77, 3000], np.int32)
    q, k, v = random(4, 6 * head_dim), random(4, 2 * head_dim, 1), random(4, 2 * head_dim, 2)
    q_norm, k_norm = random(1, head_dim, 3)[0], random(1, head_dim, 4)[0]
    norms = {"q_norm": q_norm, "k_norm": k_norm, "norm_eps": 1e-6} if has_norms else {}
    kv = KvBlocks.empty("f32", 2, head_dim, 4, 3)
    table = rope_table(inverse_frequencies(head_dim), positions)
    slots = [6, 0, 11, 5]
    got = rope_kv(q, k, v, slots, kv, cos_sin=table, **norms)
    wanted_q = normed(q, q_norm, 1e-6) if has_norms else q
    wanted_k = normed(k, k_norm, 1e-6) if has_norms else k
    np.testing.assert_allclose(got, turned(wanted_q, positions, head_dim), atol=4e-6)
    contents = read_kv_blocks(kv)
    np.testing.assert_allclose(contents.k[slots].reshape(4, -1), turned(wanted_k, positions, head_dim), atol=4e-6)
    assert np.array_equal(contents.v[slots].reshape(4, -1), v)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KV_KINDS)
def test_the_same_bits_on_every_instruction_set(kind: KvKind, isa: str) -> None:
    for head_dim, block_size in ((8, 5), (24, 16), (64, 16), (80, 1)):
        q, k, v = random(9, 3 * head_dim), random(9, 3 * head_dim, 1), random(9, 3 * head_dim, 2)
        table = rope_table(inverse_frequencies(head_dim), np.arange(9, dtype=np.int32) * 31)
        slots = np.random.default_rng(3).permutation(10 * block_size)[:9].astype(np.int32)
        norm = random(1, head_dim, 4)[0]
        outs = []
        for name in ("generic", isa):
            kv = KvBlocks.empty(kind, 3, head_dim, block_size, 10)
            got = rope_kv(q, k, v, slots, kv, cos_sin=table, q_norm=norm, k_norm=norm, norm_eps=1e-5, isa=name)
            outs.append((got, kv.data))
        assert np.array_equal(outs[0][0], outs[1][0])
        assert np.array_equal(outs[0][1], outs[1][1])


def written(kind: KvKind, values: F32, block_size: int = 16) -> F64:
    """What reading gives for rows [T, head_dim] written as k and as v."""
    kv = KvBlocks.empty(kind, 1, values.shape[1], block_size, -(-len(values) // block_size))
    rope_kv(np.zeros_like(values), values, values, np.arange(len(values)), kv)
    contents = read_kv_blocks(kv)
    assert np.array_equal(contents.k[: len(values)], contents.v[: len(values)], equal_nan=True)
    return contents.v[: len(values), 0]


@pytest.mark.parametrize("block_size", [1, 8, 16, 48])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_are_rounded_to_the_nearest(head_dim: int, block_size: int) -> None:
    x = random(50, head_dim)
    assert np.array_equal(written("f32", x, block_size), x)
    assert np.array_equal(written("f16", x, block_size), x.astype(np.float16))
    bits = x.view(np.uint32)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    assert np.array_equal(written("bf16", x, block_size), nearest)
    step = np.abs(x).max(axis=1, keepdims=True) / 127  # int8: a scale per row, half a step of error and its rounding
    assert (np.abs(written("int8", x, block_size) - x) <= step * 0.5001).all()


def test_only_the_given_slots_are_written() -> None:
    for kind in KV_KINDS:
        kv = KvBlocks.empty(kind, 2, 24, 16, 4)
        x = random(3, 48)
        rope_kv(x, x, x, [17, 5, 63], kv)
        contents = read_kv_blocks(kv)
        is_written = np.isin(np.arange(64), [17, 5, 63])
        for array in (contents.k, contents.v):
            assert np.isfinite(array[is_written]).all()
            assert np.isnan(array[~is_written]).all()


def test_fp16_cuts_off_what_it_cannot_hold() -> None:
    x = np.array([[1e6, -1e6, 65504, 65519, 65520, -65520, np.inf, -np.inf]], np.float32)
    assert list(written("f16", x)[0]) == [65504, -65504, 65504, 65504, 65504, -65504, 65504, -65504]


@pytest.mark.parametrize("kind", KV_KINDS)
def test_nan_stays_nan(kind: KvKind) -> None:
    x = random(3, 16)
    x[1, 3] = np.nan
    got = written(kind, x)
    assert np.isnan(got[1, 3])
    assert np.isfinite(got[[0, 2]]).all()


def test_int8_rows_of_zeros_tiny_and_huge_numbers() -> None:
    x = np.zeros((4, 16), np.float32)
    x[1, 2] = 1e-38
    x[2, 2] = 3e38
    x[3, 2] = np.inf
    got = written("int8", x)
    assert (got[:2] == 0).all()
    np.testing.assert_allclose(got[2], x[2], rtol=1e-6)
    assert np.isnan(got[3]).any()


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = random(2, 16)
    kv = KvBlocks.empty("f16", 1, 16, 16, 2)
    with pytest.raises(ValueError, match="slot 32 of row 1"):
        rope_kv(x, x, x, [0, 32], kv)
    with pytest.raises(ValueError, match="slot -1"):
        rope_kv(x, x, x, [-1, 3], kv)
    with pytest.raises(ValueError, match="different batches"):
        rope_kv(x, x, x, [0], kv)
    with pytest.raises(ValueError, match="multiple of 8"):
        KvBlocks.empty("f16", 1, 12, 16, 2)
    with pytest.raises(ValueError, match="block_size is 0"):
        KvBlocks.empty("f16", 1, 16, 0, 2)
