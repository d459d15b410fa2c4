"""Packing weights for the native kernels: an exact inverse, every GGUF type, joined matrices, and what is refused."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
from headrace.kernels.native.linear_ops import embed, empty_activations, linear, quantize
from headrace.kernels.native.matrix import (
    KINDS,
    MatrixSpec,
    PackedMatrix,
    aligned_bytes,
    pack_matrix,
    plan_matrix,
)
from headrace.kernels.native.unpack import unpack_matrix
from headrace.kernels.quant import QuantKind, QuantTensor, Weight, pack_int4
from headrace.models.gguf_blocks import BLOCK_TYPES, decode_blocks

from tests.kernels.native.linear_support import F32, ISAS, random_tensor, rounding_bound, weights_of
from tests.models.test_gguf import random_blocks


def dense(weight: Weight) -> F32:
    return weight.dequantize() if isinstance(weight, QuantTensor) else np.asarray(weight, np.float32)


def expand(numbers: F32 | None, group: int) -> F32 | None:
    return None if numbers is None else np.repeat(numbers, group, axis=1)


@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize("is_f16", [True, False])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 576])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_unpacking_gives_back_what_was_packed(kind: QuantKind, group: int, is_f16: bool, has_zeros: bool) -> None:
    for rows in (1, 16, 37):
        tensor = random_tensor(kind, rows, 576 if 576 % group == 0 else 640, group, is_f16=is_f16, has_zeros=has_zeros)
        again = unpack_matrix(pack_matrix([tensor]))
        assert isinstance(again, QuantTensor)
        np.testing.assert_array_equal(again.unpack(), tensor.unpack())
        np.testing.assert_array_equal(expand(again.scales, again.group_size), expand(tensor.scales, group))
        np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_dense_weights_are_kept_in_the_narrowest_exact_kind(kind: str) -> None:
    weights = np.random.default_rng(0).standard_normal((37, 33)).astype(np.float32)
    if kind == "f16":
        weights = weights.astype(np.float16).astype(np.float32)
    elif kind == "bf16":
        weights = (weights.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    packed = pack_matrix([weights])
    assert packed.spec == MatrixSpec(kind, 37, 33)  # type: ignore[arg-type]
    np.testing.assert_array_equal(dense(unpack_matrix(packed)), weights)


@pytest.mark.parametrize("type_name", sorted(BLOCK_TYPES))
def test_every_gguf_type_is_multiplied_and_looked_up_as_what_it_means(type_name: str) -> None:
    rows, cols = 35, 512
    raw = random_blocks(type_name, rows, cols // BLOCK_TYPES[type_name].block_size)
    tensor = decode_blocks(raw.reshape(-1), type_name, rows, cols)
    assert tensor is not None
    # Scales as a quantiser writes them, of either sign and with many bits, none beyond float16's normal numbers.
    rng = np.random.default_rng(0)
    narrow = np.where(tensor.scales == 0, 0, rng.uniform(0.01, 0.02, tensor.scales.shape)).astype(np.float16)
    factors = rng.integers(-31, 32, narrow.shape) if type_name[2:] == "_K" else np.ones(narrow.shape)
    scales = (narrow * factors).astype(np.float32)
    zeros = None
    if tensor.zeros is not None:
        is_fixed = type_name in ("Q4_0", "Q3_K")
        zeros = scales * np.float32(-8 if type_name == "Q4_0" else -4) if is_fixed else -scales[:, ::-1] * np.float32(4)
    tensor = QuantTensor(tensor.kind, tensor.packed, scales, zeros, tensor.group_size)
    packed = pack_matrix([tensor])
    assert packed.spec.kind == tensor.kind
    assert packed.spec.has_zeros == (type_name in ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"))
    assert packed.spec.scale_kind == "f16"
    kept = unpack_matrix(packed)
    assert isinstance(kept, QuantTensor)
    off = np.abs(np.repeat(kept.scales, kept.group_size, 1) - np.repeat(scales, tensor.group_size, 1))
    assert (off <= 2.0**-11 * np.abs(np.repeat(scales, tensor.group_size, 1))).all()
    if type_name[2:] != "_K":  # one float16 scale per group: nothing is rounded
        np.testing.assert_array_equal(embed(np.arange(rows, dtype=np.int32), packed, ISAS[0]), tensor.dequantize())
    x = rng.standard_normal((5, cols)).astype(np.float32)
    for isa in ISAS:
        np.testing.assert_array_equal(embed(np.arange(rows, dtype=np.int32), packed, isa), kept.dequantize())
        quantized = quantize(x, 16, isa)
        off = np.abs(linear(quantized, packed, isa) - quantized.dequantize() @ weights_of(kept).T)
        assert (off <= rounding_bound(kept, quantized)).all()


def test_numbers_that_float16_would_change_too_much_stay_float32() -> None:
    tensor = random_tensor("int4", 4, 64, 32, is_f16=True)
    for number, kind in (
        (0.1, "f16"), (65504, "f16"), (0.0, "f16"), (2.0**-24, "f16"), (65520, "f32"), (1e-6, "f32"), (1e38, "f32"),
    ):  # fmt: skip
        scales = tensor.scales.copy()
        scales[2, 1] = number
        changed = QuantTensor("int4", tensor.packed, scales, tensor.zeros, 32)
        assert plan_matrix([changed]).scale_kind == kind, number
        zeros = np.zeros_like(scales)
        zeros[1, 0] = number
        assert plan_matrix([QuantTensor("int4", tensor.packed, tensor.scales, zeros, 32)]).scale_kind == kind, number


@pytest.mark.parametrize(("group", "cols"), [(24, 96), (8, 64), (48, 96), (40, 40), (16, 48)])
def test_groups_that_do_not_fit_become_dense(group: int, cols: int) -> None:
    tensor = random_tensor("int4", 5, cols, group)
    packed = pack_matrix([tensor])
    assert not packed.spec.is_quantized
    np.testing.assert_array_equal(dense(unpack_matrix(packed)), tensor.dequantize())


def test_joined_matrices_lie_one_below_the_other() -> None:
    """Parts may differ in group size, zeros and scales; the weights stay the same."""
    parts = [
        random_tensor("int4", 20, 128, 16, has_zeros=False),
        random_tensor("int4", 7, 128, 64, has_zeros=True),
        random_tensor("int4", 33, 128, 32, has_zeros=False),
    ]
    packed = pack_matrix(parts)
    assert (packed.spec.rows, packed.spec.scales_per_block, packed.spec.has_zeros) == (60, 2, True)
    again = dense(unpack_matrix(packed))
    np.testing.assert_array_equal(again, np.concatenate([part.dequantize() for part in parts]))
    mixed = pack_matrix([np.ones((2, 40), np.float32), random_tensor("int8", 3, 40, 40)])
    assert mixed.spec.rows == 5
    assert dense(unpack_matrix(mixed))[0, 0] == 1


@pytest.mark.parametrize("inner", [1, 32, 33, 96])
def test_gate_and_up_are_interleaved_and_come_back(inner: int) -> None:
    gate, up = (random_tensor("int4", inner, 64, 32, seed=seed) for seed in (1, 2))
    packed = pack_matrix([gate, up], is_gated=True)
    assert packed.spec.num_panels == -(-inner // 32) * 4
    np.testing.assert_array_equal(dense(unpack_matrix(packed)), np.concatenate([gate.dequantize(), up.dequantize()]))
    if inner == 96:  # rows 32..47 of gate are the first of the second four panels
        alone = pack_matrix([QuantTensor("int4", gate.packed[32:48], gate.scales[32:48], gate.zeros[32:48], 32)])  # type: ignore[index]
        size = packed.spec.panel_bytes
        np.testing.assert_array_equal(packed.data[4 * size : 5 * size], alone.data)


def test_what_does_not_fit_together_is_refused() -> None:
    four, eight = random_tensor("int4", 4, 64, 32), random_tensor("int8", 4, 64, 32)
    with pytest.raises(ValueError, match="int4, int8 cannot be joined"):
        plan_matrix([four, eight])
    with pytest.raises(ValueError, match="dense, int4 cannot be joined"):
        plan_matrix([four, np.zeros((4, 64), np.float32)])
    with pytest.raises(ValueError, match="cannot be joined"):
        plan_matrix([four, random_tensor("int4", 4, 96, 32)])
    with pytest.raises(ValueError, match="gate and up must have one shape"):
        plan_matrix([four, random_tensor("int4", 5, 64, 32)], is_gated=True)
    with pytest.raises(ValueError, match="the parts have 4 rows, the matrix 8"):
        pack_matrix([four], spec=plan_matrix([four, four]))
    with pytest.raises(ValueError, match="out needs"):
        pack_matrix([four], out=aligned_bytes(100))
    with pytest.raises(ValueError, match="int8 weights cannot be packed as int4"):
        pack_matrix([eight], spec=plan_matrix([four]))
    sixteen = random_tensor("int4", 4, 64, 16)
    with pytest.raises(ValueError, match="groups of 16 need two scales per block"):
        pack_matrix([sixteen], spec=plan_matrix([four]))


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (MatrixSpec("int4", 0, 32, "f16", 1), "a matrix has rows and columns, not 0 x 32"),
        (MatrixSpec("int4", 16, -32, "f16", 1), "rows and columns"),
        (MatrixSpec("int4", 16, 48, "f16", 1), "48 columns are no multiple of 32"),
        (MatrixSpec("int8", 16, 32, "f16", 3), "scales_per_block is 3, not 1 or 2"),
        (MatrixSpec("int8", 15, 32, "f16", 1, is_gated=True), "15 rows cannot be halved"),
        (MatrixSpec("f32", 2**31 - 1, 2**31 - 1), "weights are too many"),
    ],
)
def test_matrices_that_cannot_be_are_refused(spec: MatrixSpec, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        _ = spec.num_bytes


def refusals() -> list[tuple[str, Callable[[PackedMatrix], object]]]:
    x = np.zeros((2, 64), np.float32)
    good = quantize(x, 8, "generic")
    narrow = quantize(x[:, :32], 8, "generic")
    narrow_out = np.zeros((2, 15), np.float32)
    gated = pack_matrix([random_tensor("int4", 32, 64, 32)] * 2, is_gated=True)
    half = pack_matrix([random_tensor("int4", 20, 64, 32)] * 2, is_gated=True)

    def misplaced(matrix: PackedMatrix) -> PackedMatrix:
        data = aligned_bytes(matrix.data.nbytes + 1)
        return PackedMatrix(matrix.spec, data[1:])

    return [
        ("no kernels nonsense that run here", lambda m: linear(good, m, "nonsense")),
        ("activations need", lambda m: linear(narrow, m, "generic")),
        ("activations have 8 or 16 bits, not 0", lambda m: linear(x, m, "generic")),
        ("x is null", lambda m: linear(good, pack_matrix([x]), "generic")),
        ("rows of x are 32 apart", lambda m: linear(np.zeros((2, 32), np.float32), pack_matrix([x]), "generic")),
        ("rows of out are 15 apart, not 20", lambda m: linear(good, m, "generic", out=narrow_out)),
        ("a gate goes with a gated matrix", lambda m: linear(good, m, "generic", epilogue="silu_gate")),
        ("a gate goes with a gated matrix", lambda m: linear(good, gated, "generic")),
        ("a multiple of 32 wide, not 20", lambda m: linear(good, half, "generic", epilogue="silu_gate", gated_bits=8)),
        ("a call has units, not 0", lambda m: linear(good, m, "generic", units_per_call=0)),
        ("not aligned to 64 bytes", lambda m: linear(good, misplaced(m), "generic")),
        ("data is cut off", lambda m: linear(good, PackedMatrix(m.spec, m.data[:64]), "generic")),
        ("there is no token 20", lambda m: embed(np.array([20], np.int32), m, "generic")),
        ("there is no token -1", lambda m: embed(np.array([-1], np.int32), m, "generic")),
        ("a gated matrix is no table", lambda m: embed(np.array([0], np.int32), gated, "generic")),
        ("8 or 16 bits, not 4", lambda m: empty_activations(1, 32, 4)),
        ("a multiple of 32 wide, not 33", lambda m: empty_activations(1, 33, 8)),
        ("activations have rows, not 0", lambda m: empty_activations(0, 32, 8)),
    ]


@pytest.mark.parametrize("index", range(18))
def test_calls_that_do_not_fit_are_refused_before_memory_is_touched(index: int) -> None:
    sentence, call = refusals()[index]
    with pytest.raises(ValueError, match=sentence):
        call(pack_matrix([random_tensor("int4", 20, 64, 32)]))


def test_the_structure_has_the_size_that_c_gives_it() -> None:
    """panel_bytes is worked out on both sides; 3 pointers or 64-bit numbers and 8 of 32 bits."""
    matrix = pack_matrix([random_tensor("int4", 20, 64, 32)])
    assert ctypes.sizeof(matrix.struct()) == 3 * 8 + 8 * 4
    assert matrix.struct().panel_bytes == 2 * (256 + 4 * 16)
    assert KINDS[matrix.struct().kind] == "int4"


def test_int4_without_zeros_counts_from_zero() -> None:
    """QuantTensor's int4 is 0..15 where there are no zeros; the panels' is q - 8, so zeros are written."""
    q = np.arange(64, dtype=np.uint8).reshape(2, 32) % 16
    tensor = QuantTensor("int4", pack_int4(q), np.full((2, 1), 0.5, np.float32), None, 32)
    packed = pack_matrix([tensor])
    assert packed.spec.has_zeros
    np.testing.assert_array_equal(dense(unpack_matrix(packed)), q * np.float32(0.5))
