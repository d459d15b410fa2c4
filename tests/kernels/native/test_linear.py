"""Linear layers over packed weights: right against float64, and the same bits whatever the instruction set, the number
of rows, the neighbours and the shares of the threads."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from headrace.kernels.native.linear_ops import Quantized, linear, quantize
from headrace.kernels.native.matrix import pack_matrix
from headrace.kernels.quant import QuantKind, QuantTensor, pack_int4

from tests.kernels.native.linear_support import (
    F32,
    ISAS,
    quantisation_bound,
    random_tensor,
    rounding_bound,
    weights_of,
)

KINDS: tuple[QuantKind, ...] = ("int4", "int8")


def random_rows(rows: int, cols: int, seed: int = 0) -> F32:
    """Activations as models have them: most near one size, some channels far larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    x[:, rng.random(cols) < 0.02] *= 30
    return x


def product(x: Quantized | F32, matrix_of: list[QuantTensor], isa: str) -> F32:
    out = linear(x, pack_matrix(matrix_of), isa)
    assert isinstance(out, np.ndarray)
    return out


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("is_f16", [True, False], ids=["f16", "f32"])
@pytest.mark.parametrize("has_zeros", [True, False], ids=["zeros", "symmetric"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_right_and_have_the_same_bits_on_every_instruction_set(
    kind: QuantKind, group: int, has_zeros: bool, is_f16: bool, bits: int
) -> None:
    for cols, outputs in ((max(group, 32), 5), (64 if group < 128 else 128, 16), (576 // group * group, 37)):
        if cols % 32 or cols % group:
            continue
        tensor = random_tensor(kind, outputs, cols, group, has_zeros=has_zeros, is_f16=is_f16, seed=cols)
        matrix = pack_matrix([tensor])
        assert (matrix.spec.scale_kind, matrix.spec.has_zeros) == ("f16" if is_f16 else "f32", has_zeros)
        weights = weights_of(tensor)
        for rows in (1, 2, 3, 4, 5, 8, 11, 70):
            x = random_rows(rows, cols, seed=rows)
            quantized = quantize(x, bits, "generic")
            oracle = linear(quantized, matrix, "generic")
            assert isinstance(oracle, np.ndarray)
            off = np.abs(oracle - quantized.dequantize() @ weights.T)
            bound = rounding_bound(tensor, quantized)
            assert (off <= bound).all(), (cols, rows, (off / bound).max())
            off = np.abs(oracle - x.astype(np.float64) @ weights.T)
            assert (off <= bound + quantisation_bound(weights, quantized)).all(), (cols, rows)
            for isa in ISAS:
                np.testing.assert_array_equal(
                    linear(quantize(x, bits, isa), matrix, isa), oracle, f"{isa} {cols} {rows}"
                )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("kind", "bits", "group"), [("int4", 8, 32), ("int4", 16, 16), ("int8", 8, 64), ("int8", 16, 32)]
)
def test_a_long_row_with_more_blocks_than_are_unpacked_at_once(
    kind: QuantKind, bits: int, group: int, isa: str
) -> None:
    tensor = random_tensor(kind, 17, 1536 + 64, group)
    quantized = quantize(random_rows(6, 1536 + 64), bits, isa)
    off = np.abs(product(quantized, [tensor], isa) - quantized.dequantize() @ weights_of(tensor).T)
    assert (off <= rounding_bound(tensor, quantized)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_how_many_rows_there_are(kind: QuantKind, bits: int, isa: str) -> None:
    matrix = pack_matrix([random_tensor(kind, 21, 96, 32)])
    x = random_rows(300, 96)
    everything = linear(quantize(x, bits, isa), matrix, isa)
    for rows in range(1, 300):
        np.testing.assert_array_equal(linear(quantize(x[:rows], bits, isa), matrix, isa), everything[:rows])
    for row in range(0, 300, 7):
        np.testing.assert_array_equal(
            linear(quantize(x[row : row + 1], bits, isa), matrix, isa), everything[row : row + 1]
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours_or_its_place(kind: QuantKind, bits: int, isa: str) -> None:
    matrix = pack_matrix([random_tensor(kind, 33, 800, 32)])  # 25 blocks: one more than are unpacked at once
    x = random_rows(13, 800)
    alone = linear(quantize(x[4:5], bits, isa), matrix, isa)
    for place, neighbours in itertools.product(range(13), (0.0, 1e30, np.nan)):
        others = np.full((13, 800), neighbours, np.float32)
        others[place] = x[4]
        np.testing.assert_array_equal(linear(quantize(others, bits, isa), matrix, isa)[place], alone[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])
def test_the_share_of_a_thread_changes_nothing(is_gated: bool, rows: int, isa: str) -> None:
    tensors = [random_tensor("int4", 96, 64, 32, seed=seed) for seed in range(2)]
    matrix = pack_matrix(tensors, is_gated=is_gated)
    x = quantize(random_rows(rows, 64), 8, isa)
    epilogue = "silu_gate" if is_gated else "store"
    whole = linear(x, matrix, isa, epilogue=epilogue)
    for units in (1, 2, 5):
        np.testing.assert_array_equal(linear(x, matrix, isa, epilogue=epilogue, units_per_call=units), whole)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("q", [0, 15, -128, 127])
def test_the_largest_integers_do_not_overflow(q: int, bits: int, isa: str) -> None:
    """All weights and activations at their ends: intermediate sums of 16 bits are as large as they get."""
    cols, ones = 192, np.ones((16, 6), np.float32)
    kind: QuantKind = "int4" if q in (0, 15) else "int8"
    if kind == "int4":
        tensor = QuantTensor("int4", pack_int4(np.full((16, cols), q, np.uint8)), ones, ones * 0, 32)
    else:
        tensor = QuantTensor("int8", np.full((16, cols), q, np.int8), ones, None, 32)
    most = 127 if bits == 8 else 32512
    for signs in (np.ones(cols), -np.ones(cols), np.resize([1, -1], cols), np.resize([1, 1, -1, -1], cols)):
        for rows in (1, 4, 9):
            x = np.tile(signs * most, (rows, 1)).astype(np.float32)
            assert (product(quantize(x, bits, isa), [tensor], isa) == (signs * most * q).sum()).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-20, 1e10, 1e27])
@pytest.mark.parametrize("magnitude", [1e-10, 1.0, 1e6])
def test_extreme_sizes_stay_finite_and_right(magnitude: float, size: float, bits: int, isa: str) -> None:
    tensor = random_tensor("int4", 18, 128, 32, is_f16=False, magnitude=magnitude)
    x = (np.random.default_rng(0).uniform(-4, 4, (3, 128)) * size).astype(np.float32)
    x[1, 32:64] = 0
    x[2] *= np.float32(10) ** np.arange(-6, 2, dtype=np.float32).repeat(16)
    quantized = quantize(x, bits, isa)
    out = product(quantized, [tensor], isa)
    assert np.isfinite(out).all()
    bound = rounding_bound(tensor, quantized)
    assert (np.abs(out - quantized.dequantize() @ weights_of(tensor).T) <= bound).all()
    bound = bound + quantisation_bound(weights_of(tensor), quantized)
    assert (np.abs(out - x.astype(np.float64) @ weights_of(tensor).T) <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_comes_out_not_finite_in_its_own_row_alone(what: float, bits: int, isa: str) -> None:
    matrix = pack_matrix([random_tensor("int4", 20, 96, 32)])
    x = random_rows(7, 96)
    sound = linear(quantize(x, bits, isa), matrix, isa)
    x[3, 40] = what
    out = linear(quantize(x, bits, isa), matrix, isa)
    assert not np.isfinite(out[3]).any()
    np.testing.assert_array_equal(np.delete(out, 3, 0), np.delete(sound, 3, 0))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_dense_products_are_right_and_have_the_same_bits_everywhere(kind: str) -> None:
    rng = np.random.default_rng(0)
    for cols, outputs in ((1, 1), (7, 16), (100, 37), (576, 50)):
        weights = rng.standard_normal((outputs, cols)).astype(np.float32)
        if kind == "f16":
            weights = weights.astype(np.float16).astype(np.float32)
        elif kind == "bf16":
            weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        matrix = pack_matrix([weights])
        assert matrix.spec.kind == kind
        x = rng.standard_normal((70, cols + 3)).astype(np.float32)[:, :cols]  # rows further apart than they are wide
        oracle = linear(x, matrix, "generic")
        exact = x.astype(np.float64) @ weights.T.astype(np.float64)
        # One fused multiply-add per feature, in order.
        bound = (cols + 1) * 2.0**-24 * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
        assert (np.abs(oracle - exact) <= bound).all()
        for isa in ISAS:
            np.testing.assert_array_equal(linear(x, matrix, isa), oracle)
            for rows in (1, 2, 3, 5, 6, 9, 13, 64, 65):
                np.testing.assert_array_equal(linear(x[:rows], matrix, isa), oracle[:rows])
