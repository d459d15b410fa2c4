"""Native norms, sums, gates and the soft cap against float64, and with the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from headrace.kernels.native.library import info
from headrace.kernels.native.single_ops import ELEMENTWISE, Bits, ElementwiseKind, elementwise, rms_norm

from tests.support.activations import quantized

F32 = npt.NDArray[np.float32]
ISAS = info().usable
# Widths below, at and beyond multiples of 16 lanes and of the norm's 64.
WIDTHS = [1, 7, 15, 16, 17, 31, 48, 63, 64, 65, 100, 576, 1000]


def random(rows: int, width: int, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_normal((rows, width)) * 3).astype(np.float32)


def norm_reference(x: F32, weight: F32, eps: float) -> npt.NDArray[np.float64]:
    groups = x.astype(np.float64).reshape(len(x), -1, len(weight))
    return (groups / np.sqrt((groups**2).mean(-1, keepdims=True) + eps) * weight).reshape(x.shape)


@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_is_within_1e_6_of_float64(width: int) -> None:
    x, weight = random(5, width), random(1, width, 1)[0]
    out = rms_norm(x, weight, 1e-5).out
    np.testing.assert_allclose(out, norm_reference(x, weight, 1e-5), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("group", [8, 16, 20, 64, 96])
def test_rms_norm_of_heads(group: int) -> None:
    x, weight = random(3, 5 * group), random(1, group, 1)[0]
    np.testing.assert_allclose(rms_norm(x, weight, 1e-6).out, norm_reference(x, weight, 1e-6), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("scale", [1e-18, 1e-3, 1e3, 1e15])
def test_rms_norm_of_large_and_small_rows(scale: float) -> None:
    x, weight = (random(4, 576) * np.float32(scale)).astype(np.float32), random(1, 576, 1)[0]
    np.testing.assert_allclose(rms_norm(x, weight, 1e-30).out, norm_reference(x, weight, 1e-30), rtol=1e-5)


def test_rms_norm_of_zeros_is_zero_and_nan_stays_in_its_row() -> None:
    x = random(3, 64)
    x[0] = 0.0
    x[1, 5] = np.nan
    out = rms_norm(x, np.ones(64, np.float32), 1e-5).out
    assert out is not None
    assert (out[0] == 0).all()
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[2]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm_has_the_same_bits_everywhere_and_alone(width: int, isa: str) -> None:
    x, weight = random(6, width), random(1, width, 1)[0]
    together = rms_norm(x, weight, 1e-5, isa="generic").out
    assert np.array_equal(rms_norm(x, weight, 1e-5, isa=isa).out, together)
    alone = [rms_norm(x[i : i + 1], weight, 1e-5, isa=isa).out for i in range(6)]
    assert np.array_equal(np.concatenate(alone), together)


def test_rows_may_be_gathered() -> None:
    x, weight = random(9, 96), random(1, 96, 1)[0]
    out = rms_norm(x, weight, 1e-5).out
    assert out is not None
    index = [7, 0, 7, 3]
    assert np.array_equal(rms_norm(x, weight, 1e-5, row_index=index).out, out[index])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wants_floats", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_quantised_norm_is_the_norm_quantised(bits: Bits, wants_floats: bool, isa: str) -> None:
    x, weight = random(7, 576), random(1, 576, 1)[0]
    index = np.array([6, 2, 1, 0, 5], np.int32)
    want = rms_norm(x, weight, 1e-5, row_index=index).out
    assert want is not None
    got = rms_norm(x, weight, 1e-5, row_index=index, bits=bits, wants_floats=wants_floats, isa=isa)
    assert got.quantized is not None
    assert np.array_equal(got.quantized, quantized(want, bits))
    assert wants_floats == (got.out is not None)
    assert got.out is None or np.array_equal(got.out, want)


def elementwise_reference(kind: ElementwiseKind, a: F32, b: F32, cap: float) -> npt.NDArray[np.float64]:
    x, y = a.astype(np.float64), b.astype(np.float64)
    if kind == "add":
        return x + y
    if kind == "silu_gate":
        return x / (1 + np.exp(-x)) * y
    if kind == "gelu_gate":
        return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * y
    return cap * np.tanh(x / cap)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_ops_are_near_float64(kind: ElementwiseKind, width: int) -> None:
    a, b = random(5, width), random(5, width, 1)
    got = elementwise(kind, a, b, cap=5.0)
    # 1e-6 of the result; of gelu's far negative side, whose float64 form cancels, 1e-6 at most.
    np.testing.assert_allclose(got, elementwise_reference(kind, a, b, 5.0), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ELEMENTWISE)
def test_elementwise_ops_have_the_same_bits_everywhere(kind: ElementwiseKind, isa: str) -> None:
    for width in WIDTHS:
        a, b = random(3, width) * np.float32(20), random(3, width, 1)
        assert np.array_equal(elementwise(kind, a, b, cap=30.0, isa=isa), elementwise(kind, a, b, cap=30.0))


def test_soft_cap_bounds_everything_but_nan() -> None:
    x = np.array([[-np.inf, -1e30, -0.0, 0.0, 1e-30, 1e30, np.inf, np.nan]], np.float32)
    out = elementwise("soft_cap", x, cap=30.0)[0]
    np.testing.assert_allclose(out[:7], [-30, -30, 0, 0, 1e-30, 30, 30], rtol=1e-6)
    assert np.isnan(out[7])


def test_arguments_that_do_not_fit_are_refused() -> None:
    x = random(2, 48)
    with pytest.raises(ValueError, match="no groups of 5"):
        rms_norm(x, np.ones(5, np.float32), 1e-5)
    with pytest.raises(ValueError, match=r"row_index\[1\]"):
        rms_norm(x, np.ones(48, np.float32), 1e-5, row_index=[0, 2])
    with pytest.raises(ValueError, match="multiple of 32"):
        rms_norm(x, np.ones(48, np.float32), 1e-5, bits=8)
    with pytest.raises(ValueError, match="needs out"):
        rms_norm(random(2, 64), np.ones(32, np.float32), 1e-5, bits=8, wants_floats=False)
    with pytest.raises(ValueError, match="b is null"):
        elementwise("add", x)
    with pytest.raises(ValueError, match="cap is 0"):
        elementwise("soft_cap", x)
