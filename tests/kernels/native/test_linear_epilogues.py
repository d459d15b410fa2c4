"""What follows a matrix product in the same kernel: bias, residual, gates, quantisation; and the embedding gather."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from headrace.kernels.native.linear_ops import Quantized, embed, linear, quantize
from headrace.kernels.native.matrix import pack_matrix
from headrace.kernels.native.unpack import unpack_matrix
from headrace.kernels.quant import QuantKind, QuantTensor

from tests.kernels.native.linear_support import F32, F64, ISAS, random_tensor


def random_rows(rows: int, cols: int) -> F32:
    return np.random.default_rng(1).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 66])
def test_a_bias_and_a_residual_are_added_in_that_order(rows: int, isa: str) -> None:
    matrix = pack_matrix([random_tensor("int4", 37, 64, 32)])
    x = quantize(random_rows(rows, 64), 8, isa)
    bias = np.random.default_rng(2).standard_normal(48).astype(np.float32)
    bias[37:] = np.nan  # of outputs that are not there
    plain = linear(x, matrix, isa)
    residual = random_rows(rows, 40)[:, :37]
    behind = residual.base.copy()  # type: ignore[union-attr]
    np.testing.assert_array_equal(linear(x, matrix, isa, bias=bias), plain + bias[:37])
    out = linear(x, matrix, isa, bias=bias, epilogue="add", out=residual)
    np.testing.assert_array_equal(out, behind[:, :37] + (plain + bias[:37]))
    np.testing.assert_array_equal(residual.base[:, 37:], behind[:, 37:])  # type: ignore[index]


def activation(gate: F64, kind: str) -> F64:
    if kind == "silu_gate":
        return gate / (1 + np.exp(-gate))
    # (1 + tanh y) / 2 = 1 / (1 + exp(-2 y)), without the cancellation
    return gate / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("inner", [32, 96, 100])
@pytest.mark.parametrize("epilogue", ["silu_gate", "gelu_gate"])
def test_gates_are_applied_to_the_right_halves(
    epilogue: Literal["silu_gate", "gelu_gate"], inner: int, isa: str
) -> None:
    gate, up = (random_tensor("int4", inner, 64, 32, seed=seed) for seed in (1, 2))
    matrix = pack_matrix([gate, up], is_gated=True)
    for rows in (1, 3, 65):
        x = quantize(random_rows(rows, 64), 8, isa)
        out = linear(x, matrix, isa, epilogue=epilogue)
        gates, ups = (np.asarray(linear(x, pack_matrix([tensor]), isa), np.float64) for tensor in (gate, up))
        want = activation(gates, epilogue) * ups
        # vector_math.h: 2.5 units for SiLU, 2e-7 (1 + |x|^3) for GELU; and the rounded product with up.
        error = 4e-7 if epilogue == "silu_gate" else 1e-7 + 2e-7 * (1 + np.abs(gates) ** 3)
        assert (np.abs(out - want) <= error * np.abs(want) + 1e-35 * np.abs(ups)).all()
        np.testing.assert_array_equal(
            out, linear(quantize(random_rows(rows, 64), 8, "generic"), matrix, "generic", epilogue=epilogue)
        )


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("rows", [1, 6, 67])
def test_a_gate_quantises_what_it_would_store(rows: int, bits: int, isa: str) -> None:
    matrix = pack_matrix([random_tensor("int8", 96, 64, 32, seed=seed) for seed in (1, 2)], is_gated=True)
    x = quantize(random_rows(rows, 64), 16, isa)
    stored = linear(x, matrix, isa, epilogue="silu_gate")
    assert isinstance(stored, np.ndarray)
    got = linear(x, matrix, isa, epilogue="silu_gate", gated_bits=bits, units_per_call=2)
    assert isinstance(got, Quantized)
    want = quantize(stored, bits, isa)
    np.testing.assert_array_equal(got.scales, want.scales)
    np.testing.assert_array_equal(got.scale_sums, want.scale_sums)
    np.testing.assert_array_equal(got.neg8_sums, want.neg8_sums)
    np.testing.assert_array_equal(got.q(), want.q())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_embeddings_are_the_dequantised_rows(kind: QuantKind, group: int, has_zeros: bool, isa: str) -> None:
    table = random_tensor(kind, 45, 192, group, has_zeros=has_zeros)
    ids = np.array([0, 44, 15, 16, 44, 17], np.int32)
    packed = pack_matrix([table])
    np.testing.assert_array_equal(embed(ids, packed, isa), table.dequantize()[ids])
    scale = float(np.float32(27.7))
    np.testing.assert_array_equal(embed(ids, packed, isa, scale), table.dequantize()[ids] * np.float32(scale))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dense_embeddings_are_the_rows(dtype: type[np.generic], isa: str) -> None:
    table = np.random.default_rng(0).standard_normal((45, 33)).astype(dtype).astype(np.float32)
    ids = np.array([44, 0, 31, 32], np.int32)
    np.testing.assert_array_equal(embed(ids, pack_matrix([table]), isa), table[ids])


def test_scales_that_were_rounded_are_those_of_the_embedding_too() -> None:
    table = random_tensor("int4", 16, 64, 32, is_f16=False, magnitude=1e-2)
    scaled = QuantTensor("int4", table.packed, table.scales + np.float32(0.01), table.zeros, 32)
    packed = pack_matrix([scaled])
    again = unpack_matrix(packed)
    assert isinstance(again, QuantTensor)
    ids = np.arange(16, dtype=np.int32)
    np.testing.assert_array_equal(embed(ids, packed, "generic"), again.dequantize())
