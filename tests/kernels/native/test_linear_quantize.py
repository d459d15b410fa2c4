"""Activations as int8 and int16 in groups: what csrc/activations.h promises, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.kernels.native.linear_ops import Quantized, quantize

from tests.kernels.native.linear_support import F32, ISAS

MOST = {8: 127, 16: 32512}


def bytes_of(x: Quantized) -> bytes:
    """All that was written: what belongs to the rows there are."""
    header = [x.scales, x.scale_sums, x.neg8_sums]
    return b"".join(part.tobytes() for part in [*header, x.q()])


def awkward_rows() -> F32:
    """Groups of every size, with ties and with zeros of both signs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 320)) * 10.0 ** rng.integers(-46, 38, (9, 10)).repeat(32, axis=1)
    x = np.clip(x, -3.4e38, 3.4e38).astype(np.float32)
    x[0] = 0
    x[1, ::2] = -0.0
    x[2, :32] = np.arange(32) + 0.5  # halves, with 127 below: ties
    x[2, 0] = 127
    x[3, 32:64] = 1e-45
    x[4, 64:96] = 3.4e38
    x[5, 7] = 2.0**-110
    return x


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
def test_scales_integers_and_sums_are_what_the_layout_says(bits: int, isa: str) -> None:
    x = awkward_rows()
    got = quantize(x, bits, isa)
    groups = x.reshape(9, 10, 32)
    largest = np.abs(groups).max(axis=2)
    is_zero = largest < np.float32(2.0**-110)
    scales = np.where(is_zero, np.float32(0), largest / np.float32(MOST[bits]))
    np.testing.assert_array_equal(got.scales, scales)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(is_zero, np.float32(0), np.float32(MOST[bits]) / largest).astype(np.float32)
    q = np.rint(groups * inverse[:, :, None]).astype(np.int32)  # to even, as float32
    np.testing.assert_array_equal(got.q().reshape(q.shape), q)
    assert np.abs(q).max() == MOST[bits]
    np.testing.assert_array_equal(got.neg8_sums, -8 * np.stack([q.sum(axis=2), q[:, :, 16:].sum(axis=2)]))
    with np.errstate(over="ignore"):  # 32 times the largest numbers
        np.testing.assert_array_equal(got.scale_sums, scales * q.sum(axis=2).astype(np.float32))
    # Half a step, and the rounding of the step itself.
    off = np.abs(got.dequantize().reshape(groups.shape) - groups)
    assert (off <= np.where(is_zero, 2.0**-110, scales.astype(np.float64) * 0.51)[:, :, None]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
def test_every_instruction_set_writes_the_same_bytes(bits: int, isa: str) -> None:
    for rows in range(1, 10):
        x = awkward_rows()[:rows]
        assert bytes_of(quantize(x, bits, isa)) == bytes_of(quantize(x, bits, "generic"))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("what", [np.nan, -np.nan, np.inf, -np.inf])
def test_a_group_that_is_not_finite_says_so_and_nothing_else_changes(what: float, bits: int, isa: str) -> None:
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    sound = quantize(x, bits, isa)
    x[2, 45] = what
    got = quantize(x, bits, isa)
    assert np.isnan(got.scales[2, 1])
    assert np.isnan(got.scale_sums[2, 1])
    assert not got.q()[2, 32:64].any()
    assert np.isfinite(got.scales).sum() == got.scales.size - 1
    assert (got.q() != sound.q()).sum() <= 32
    assert bytes_of(got) == bytes_of(quantize(x, bits, "generic"))
