"""Packed matrices against what they were packed from."""

import numpy as np
import pytest
import torch
from headrace.kernels.linear import pack, unpack
from headrace.kernels.linear.layout import TILE, num_splits
from headrace.kernels.quant import QuantTensor

from tests.gpu.numerics.linear_case import quant


@pytest.mark.parametrize("is_gated", [False, True])
@pytest.mark.parametrize("zeros", ["none", "any", "centre"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_unpack_is_the_inverse(kind: str, group: int, zeros: str, is_gated: bool) -> None:
    sources = [quant(kind, 37, 3 * group, group, zeros, seed) for seed in range(2)]
    for dtype in (torch.float16, torch.float32):
        packed = pack(sources, dtype=dtype, is_gated=is_gated)
        assert (packed.kind, packed.shape) == (kind, (74, 3 * group))
        back = unpack(packed)
        assert len(back) == 2
        for source, got in zip(sources, back, strict=True):
            assert isinstance(got, QuantTensor)
            assert (got.kind, got.group_size) == (kind, group)
            np.testing.assert_array_equal(got.unpack(), source.unpack())
            np.testing.assert_array_equal(got.scales, source.scales)
            np.testing.assert_array_equal(got.dequantize(), source.dequantize())


@pytest.mark.parametrize("is_gated", [False, True])
def test_dense_matrices_come_back(is_gated: bool) -> None:
    sources = [torch.randn(9, 21), torch.randn(9, 21)]
    packed = pack(sources, dtype=torch.bfloat16, is_gated=is_gated)
    assert packed.tensors["weight"].stride(0) * 2 % 16 == 0
    for source, got in zip(sources, unpack(packed), strict=True):
        assert torch.equal(got, source.to(torch.bfloat16))


def test_a_nibble_lies_where_the_layout_says() -> None:
    """Plane i of word w of row r of block b of tile t is weight (64 t + r, 128 b + 32 i + w)."""
    source = quant("int4", 100, 384, 32, "any")
    words = pack([source], dtype=torch.float16).tensors["words"]
    assert words.shape == (2, 3, TILE, 32)
    q = source.unpack()
    for row, col in ((0, 0), (3, 33), (63, 383), (64, 129), (99, 290)):
        block, inside = divmod(col, 128)
        word = int(words[row // TILE, block, row % TILE, inside % 32]) & 0xFFFF
        assert word >> (4 * (inside // 32)) & 0xF == q[row, col]


def test_matrices_of_two_kinds_become_the_one_that_holds_both() -> None:
    sources = [quant("int4", 24, 128, 32, "any"), quant("int8", 8, 128, 16, "none")]
    packed = pack(sources, dtype=torch.float16)
    assert (packed.kind, packed.group_size, packed.rows) == ("int8", 16, (24, 8))
    for source, got in zip(sources, unpack(packed), strict=True):
        assert isinstance(got, QuantTensor)
        np.testing.assert_array_equal(got.dequantize(), source.dequantize())


def test_what_no_kernel_takes_is_dense() -> None:
    odd = quant("int8", 8, 72, 24, "none")
    assert pack([odd], dtype=torch.float32).kind == "dense"
    mixed = pack([quant("int4", 8, 64, 32, "any"), np.ones((8, 64), np.float32)], dtype=torch.float32)
    assert mixed.kind == "dense"
    assert torch.equal(mixed.tensors["weight"][8:], torch.ones(8, 64))


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    source = quant("int4", 16, 64, 32, "any")
    tiny = QuantTensor("int4", source.packed, source.scales * np.float32(2.0**-24), None, 32)
    packed = pack([tiny], dtype=torch.float16)
    assert packed.tensors["scales"].dtype == torch.float32
    got = unpack(packed)[0]
    assert isinstance(got, QuantTensor)
    np.testing.assert_array_equal(got.dequantize(), tiny.dequantize())


def test_symmetric_weights_carry_no_zeros() -> None:
    assert "zeros" not in pack([quant("int4", 16, 64, 32, "centre")], dtype=torch.float16).tensors
    assert "zeros" not in pack([quant("int8", 16, 64, 32, "none")], dtype=torch.float16).tensors
    assert "zeros" in pack([quant("int4", 16, 64, 32, "none")], dtype=torch.float16).tensors


@pytest.mark.parametrize("shapes", [[], [(4, 64), (4, 32)], [(4,)]])
def test_shapes_that_do_not_go_together(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="same cols"):
        pack([torch.zeros(shape) for shape in shapes], dtype=torch.float32)


def test_a_gate_needs_an_up_of_its_shape() -> None:
    with pytest.raises(ValueError, match="gate and up"):
        pack([torch.zeros(4, 8), torch.zeros(5, 8)], dtype=torch.float32, is_gated=True)


def test_no_chunk_of_k_is_empty() -> None:
    for n in (32, 576, 4096, 28672, 128256):
        for k in (64, 576, 1536, 4096, 14336):
            splits, blocks = num_splits(n, k, 128), -(-k // 128)
            assert 1 <= splits <= 8
            assert -(-blocks // splits) * (splits - 1) < blocks
