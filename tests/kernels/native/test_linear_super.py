"""Weights with scales of two levels (GGUF's Q4_K, Q5_K, Q6_K): packed in the bits that the file has and back, right
against float64, and the same bits whatever the instruction set, the number of rows and the shares of the threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from headrace.kernels.native.linear_ops import Quantized, embed, linear, quantize
from headrace.kernels.native.matrix import (
    MatrixSpec,
    PackedMatrix,
    aligned_bytes,
    pack_matrix,
    plan_matrix,
)
from headrace.kernels.native.ops import form_of
from headrace.kernels.native.unpack import unpack_matrix
from headrace.kernels.quant import QuantTensor, TwoLevel
from headrace.models.gguf_blocks import BLOCK_TYPES, decode_blocks

from tests.kernels.native.linear_support import F32, F64, ISAS, quantisation_bound, random_tensor, weights_of
from tests.models.test_gguf import random_blocks

TYPES = ("Q4_K", "Q5_K", "Q6_K")
KIND = {"Q4_K": "super4", "Q5_K": "super5", "Q6_K": "super6"}


def random_super(type_name: str, rows: int, cols: int, *, d: float = 1e-3, seed: int = 0) -> QuantTensor:
    """Random blocks, d and dmin of either sign between d / 2 and d, sub-scales anywhere in their range."""
    return decoded(type_name, random_blocks(type_name, rows, cols // 256, seed).reshape(-1), rows, cols, d, seed)


def decoded(
    type_name: str, raw: np.ndarray[tuple[int], np.dtype[np.uint8]], rows: int, cols: int, d: float, seed: int = 0
) -> QuantTensor:
    rng = np.random.default_rng(seed)
    blocks = raw.copy().view(BLOCK_TYPES[type_name].layout)
    for name in ("d", "dmin"):
        if name in (blocks.dtype.names or ()):
            blocks[name] = rng.uniform(d / 2, d, len(blocks)) * rng.choice([-1, 1], len(blocks))
    tensor = decode_blocks(blocks.view(np.uint8), type_name, rows, cols)
    assert tensor is not None
    assert tensor.two_level is not None
    return tensor


def flat(tensor: QuantTensor) -> QuantTensor:
    """The same weights without what they were stored as."""
    return QuantTensor(tensor.kind, tensor.packed, tensor.scales, tensor.zeros, tensor.group_size)


def random_rows(rows: int, cols: int, seed: int = 0) -> F32:
    """Activations as models have them: most near one size, some channels far larger."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)).astype(np.float32)
    x[:, rng.random(cols) < 0.02] *= 30
    return x


def rounding_bound(tensor: QuantTensor, x: Quantized) -> F64:
    """By how much a product of these may differ from the exact one, float64 [x.rows, rows].

    Integers are exact. In a super-block each of at most 16 parts is rounded once to a float and once when it is added;
    each of 8 mins twice (the sum of its activations, the addition); then come two additions to the whole. So n
    super-blocks make at most 2 * (16 + 8) + 2 n roundings on the way of any one number, each of half a unit (2^-24) of
    a number no larger than the sum of all |scale * q * x| and |zero * x|. Below the normal numbers a rounding is
    2^-150, of something that is then multiplied by d.
    """
    supers = tensor.shape[1] // 256
    scales = np.repeat(np.abs(tensor.scales.astype(np.float64)), tensor.group_size, axis=1)
    sizes = np.abs(tensor.unpack().astype(np.float64)) * scales
    if tensor.zeros is not None:
        sizes = sizes + np.repeat(np.abs(tensor.zeros.astype(np.float64)), tensor.group_size, axis=1)
    bound: F64 = (48 + 2 * supers) * 2.0**-24 * (np.abs(x.dequantize()) @ sizes.T)
    assert tensor.two_level is not None
    largest = max(1.0, *(float(np.abs(n).max()) for n in (tensor.two_level.d, tensor.two_level.dmin) if n is not None))
    return bound + 64 * supers * largest * 2.0**-149


def check(x: F32, tensor: QuantTensor, matrix: PackedMatrix, bits: int) -> F32:
    """Right in plain C++, and the same bits everywhere. Returns them."""
    quantized = quantize(x, bits, "generic")
    oracle = linear(quantized, matrix, "generic")
    assert isinstance(oracle, np.ndarray)
    assert np.isfinite(oracle).all()
    bound = rounding_bound(tensor, quantized)
    off = np.abs(oracle - quantized.dequantize() @ weights_of(tensor).T)
    assert (off <= bound).all(), (x.shape, (off / bound).max())
    off = np.abs(oracle - x.astype(np.float64) @ weights_of(tensor).T)
    assert (off <= bound + quantisation_bound(weights_of(tensor), quantized)).all()
    for isa in ISAS:
        np.testing.assert_array_equal(linear(quantize(x, bits, isa), matrix, isa), oracle, f"{isa} {x.shape}")
    return oracle


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("type_name", TYPES)
def test_products_are_right_and_have_the_same_bits_on_every_instruction_set(type_name: str, bits: int) -> None:
    for cols, outputs in ((256, 5), (512, 16), (1280, 37)):
        tensor = random_super(type_name, outputs, cols, seed=cols)
        matrix = pack_matrix([tensor])
        assert matrix.spec.kind == KIND[type_name]
        for rows in (1, 2, 3, 4, 5, 8, 11, 64, 70):
            check(random_rows(rows, cols, seed=rows), tensor, matrix, bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("type_name", TYPES)
def test_a_row_depends_on_itself_alone(type_name: str, bits: int, isa: str) -> None:
    matrix = pack_matrix([random_super(type_name, 21, 512)])
    x = random_rows(70, 512)
    everything = linear(quantize(x, bits, isa), matrix, isa)
    for rows in range(1, 70):
        np.testing.assert_array_equal(linear(quantize(x[:rows], bits, isa), matrix, isa), everything[:rows])
    alone = linear(quantize(x[4:5], bits, isa), matrix, isa)
    for place, neighbours in itertools.product((0, 1, 5, 12), (0.0, 1e30, np.nan)):
        others = np.full((13, 512), neighbours, np.float32)
        others[place] = x[4]
        np.testing.assert_array_equal(linear(quantize(others, bits, isa), matrix, isa)[place], alone[0])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("type_name", TYPES)
def test_gate_and_up_are_interleaved_and_the_share_of_a_thread_changes_nothing(
    type_name: str, rows: int, isa: str
) -> None:
    gate, up = (random_super(type_name, 48, 256, seed=seed) for seed in range(2))
    matrix = pack_matrix([gate, up], is_gated=True)
    x = quantize(random_rows(rows, 256), 8, isa)
    whole = linear(x, matrix, isa, epilogue="silu_gate")
    assert isinstance(whole, np.ndarray)
    g, u = (np.asarray(linear(x, pack_matrix([tensor]), isa), np.float64) for tensor in (gate, up))
    want = g / (1 + np.exp(-g)) * u
    np.testing.assert_allclose(whole, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())
    for units in (1, 2):
        np.testing.assert_array_equal(linear(x, matrix, isa, epilogue="silu_gate", units_per_call=units), whole)


def with_ends(type_name: str, q: int, scale: int, minimum: int) -> QuantTensor:
    """All weights d * scale * q - dmin * minimum with d = dmin = 1."""
    rows, cols, ones = 16, 512, np.ones((16, 2), np.float16)
    if type_name == "Q6_K":
        small = np.full((rows, cols // 16), scale, np.int8)
        two = TwoLevel(ones, None, small, None)
        return QuantTensor("int8", np.full((rows, cols), q, np.int8), small.astype(np.float32), None, 16, two)
    scales, mins = (np.full((rows, cols // 32), number, np.uint8) for number in (scale, minimum))
    two = TwoLevel(ones, ones, scales, mins)
    flat_numbers = scales.astype(np.float32), -mins.astype(np.float32)
    if type_name == "Q4_K":
        return QuantTensor("int4", np.full((rows, cols // 2), q * 0x11, np.uint8), *flat_numbers, 32, two)
    return QuantTensor("int8", np.full((rows, cols), q, np.int8), *flat_numbers, 32, two)


ENDS = (("Q4_K", 15, 63), ("Q5_K", 31, 63), *(("Q6_K", q, scale) for q in (-32, 31) for scale in (-128, 127)))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("type_name", "q", "scale"), ENDS)
def test_the_largest_integers_do_not_overflow(type_name: str, q: int, scale: int, bits: int) -> None:
    """Weights, scales and activations at their ends: intermediate sums of 16 and 32 bits are as large as they get."""
    most = 127 if bits == 8 else 32512
    for minimum in (0, 63):
        tensor = with_ends(type_name, q, scale, minimum)
        matrix = pack_matrix([tensor])
        for signs in (np.ones(512), -np.ones(512), np.resize([1, -1], 512), np.resize([1, 1, -1, -1], 512)):
            for rows in (1, 4, 9):
                check(np.tile(signs * most, (rows, 1)).astype(np.float32), tensor, matrix, bits)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("d", [1e-7, 6e-5, 1.0, 6e4])  # 1e-7: no normal number of float16
@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-30, 1e-20, 1e10, 1e25])
def test_extreme_sizes_stay_finite_and_right(size: float, d: float, type_name: str, bits: int) -> None:
    tensor = random_super(type_name, 18, 512, d=d)
    x = (np.random.default_rng(0).uniform(-4, 4, (3, 512)) * size).astype(np.float32)
    x[1, 32:64] = 0
    x[2] *= np.float32(10) ** np.arange(-6, 2, dtype=np.float32).repeat(64)
    check(x, tensor, pack_matrix([tensor]), bits)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type_name", TYPES)
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_what_is_not_finite_comes_out_not_finite_in_its_own_row_alone(what: float, type_name: str, isa: str) -> None:
    matrix = pack_matrix([random_super(type_name, 20, 256)])
    x = random_rows(7, 256)
    sound = linear(quantize(x, 8, isa), matrix, isa)
    x[3, 40] = what
    out = linear(quantize(x, 8, isa), matrix, isa)
    assert not np.isfinite(out[3]).any()
    np.testing.assert_array_equal(np.delete(out, 3, 0), np.delete(sound, 3, 0))


@pytest.mark.parametrize("type_name", TYPES)
def test_packing_keeps_every_number_and_has_an_inverse(type_name: str) -> None:
    for rows, cols in ((1, 256), (16, 768), (37, 512)):
        tensor = random_super(type_name, rows, cols)
        packed = pack_matrix([tensor])
        again = unpack_matrix(packed)
        assert isinstance(again, QuantTensor)
        assert (again.kind, again.group_size) == (tensor.kind, tensor.group_size)
        np.testing.assert_array_equal(again.packed, tensor.packed)
        np.testing.assert_array_equal(again.scales, tensor.scales)
        np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())
        two, had = again.two_level, tensor.two_level
        assert two is not None
        assert had is not None
        for name in ("d", "dmin", "sub_scales", "sub_mins"):
            np.testing.assert_array_equal(getattr(two, name), getattr(had, name))
            assert (getattr(had, name) is None) == (type_name == "Q6_K" and name in ("dmin", "sub_mins"))
        for isa in ISAS:
            ids = np.arange(rows, dtype=np.int32)
            np.testing.assert_array_equal(embed(ids, packed, isa), tensor.dequantize())
            np.testing.assert_array_equal(embed(ids, packed, isa, scale=3.7), tensor.dequantize() * np.float32(3.7))


@pytest.mark.parametrize(("type_name", "most"), [("Q4_K", 4.63), ("Q5_K", 5.63), ("Q6_K", 6.63)])
def test_a_weight_takes_hardly_more_bits_than_in_the_file(type_name: str, most: float) -> None:
    matrix = pack_matrix([random_super(type_name, 160, 1024)])
    assert matrix.data.nbytes == matrix.spec.num_bytes
    assert 8 * matrix.data.nbytes / (160 * 1024) <= most


@pytest.mark.parametrize("type_name", TYPES)
def test_the_two_levels_are_the_flat_scales(type_name: str) -> None:
    tensor = random_super(type_name, 6, 512)
    two = tensor.two_level
    assert two is not None
    repeat = 256 // tensor.group_size
    np.testing.assert_array_equal(np.repeat(two.d.astype(np.float32), repeat, 1) * two.sub_scales, tensor.scales)
    if two.dmin is not None:
        assert two.sub_mins is not None
        np.testing.assert_array_equal(-np.repeat(two.dmin.astype(np.float32), repeat, 1) * two.sub_mins, tensor.zeros)


def test_joined_matrices_keep_two_levels_where_all_have_the_same() -> None:
    parts = [random_super("Q4_K", rows, 256, seed=rows) for rows in (20, 7, 33)]
    packed = pack_matrix(parts)
    assert packed.spec == MatrixSpec("super4", 60, 256)
    again = unpack_matrix(packed)
    assert isinstance(again, QuantTensor)
    np.testing.assert_array_equal(again.dequantize(), np.concatenate([part.dequantize() for part in parts]))
    mixed = plan_matrix([parts[0], random_tensor("int4", 5, 256, 32)])
    assert (mixed.kind, mixed.has_zeros) == ("int4", True)
    assert plan_matrix([random_super("Q5_K", 4, 256), random_super("Q6_K", 4, 256)]).kind == "int8"


def test_forms_tell_two_levels_from_flat_scales_and_from_each_other() -> None:
    tensors = [random_super(name, 4, 256) for name in TYPES]
    forms = {form_of(tensor) for tensor in [*tensors, *map(flat, tensors)]}
    assert len(forms) == 6
    assert all(form.is_quantized for form in forms)


def refusals() -> list[tuple[str, Callable[[], object]]]:
    four, six = random_super("Q4_K", 4, 256), random_super("Q6_K", 4, 256)
    packed = pack_matrix([four])
    x = quantize(np.zeros((1, 256), np.float32), 8, "generic")
    cut = PackedMatrix(packed.spec, packed.data[:-64])
    return [
        ("288 columns are no multiple of 256", lambda: MatrixSpec("super4", 16, 288).num_bytes),
        ("the scales of kind 7 are fixed", lambda: MatrixSpec("super6", 16, 256, has_zeros=True).num_bytes),
        ("the scales of kind 5 are fixed", lambda: MatrixSpec("super4", 16, 256, "f32", 1).num_bytes),
        ("int8 weights cannot be packed as super4", lambda: pack_matrix([six], spec=plan_matrix([four]))),
        ("int4 weights cannot be packed as super4", lambda: pack_matrix([flat(four)], spec=plan_matrix([four]))),
        ("the parts have 4 rows, the matrix 8", lambda: pack_matrix([four], spec=plan_matrix([four, four]))),
        ("out needs 2368 bytes", lambda: pack_matrix([four], out=aligned_bytes(100))),
        ("data is cut off", lambda: linear(x, cut, "generic")),
    ]


@pytest.mark.parametrize("index", range(8))
def test_what_cannot_be_is_refused(index: int) -> None:
    sentence, call = refusals()[index]
    with pytest.raises(ValueError, match=sentence):
        call()
