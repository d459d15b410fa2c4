"""exp, tanh, SiLU and GELU on lanes against float64: the bounds that kernels/csrc/vector_math.h states.

The inputs walk through all of float32 by its bit patterns. That the bits are the same on every instruction set is
test_simd.py's business for edges, and tested here for a sample of the walk.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from headrace.kernels.native.lanes import Operation, lanes
from headrace.kernels.native.library import info

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def walk(step: int) -> F32:
    """[n, 16]: every step-th float32, infinities and NaN among them, and all floats of small size more densely."""
    rng = np.random.default_rng(step)
    bits = np.arange(rng.integers(step), 1 << 32, step, dtype=np.uint64).astype(np.uint32)
    dense = rng.uniform(-20, 20, 1 << 19).astype(np.float32)
    edges = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 88.72, 88.73, -87.3, -87.7, -103.9, -104.1], np.float32)
    bits[np.isnan(bits.view(np.float32))] |= 1 << 22  # quiet: numpy warns of signalling ones
    x = np.concatenate([bits.view(np.float32), dense, edges])
    return np.resize(x, -(-len(x) // 16) * 16).reshape(-1, 16)


def run(operation: Operation, x: F32, isa: str | None = None) -> F32:
    return lanes(operation, x, isa=isa).view(np.float32)


def reference(operation: Operation, x: F32) -> F64:
    v = x.astype(np.float64)
    with np.errstate(all="ignore"):
        if operation in ("exp", "exp_weight"):
            return np.exp(v)
        if operation == "tanh":
            return np.tanh(v)
        if operation == "silu":
            return v / (1 + np.exp(-v))
        return v / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


def ulps(got: F32, want: F64) -> F64:
    """How many units in the last place of float32 lie between them; 0 where both overflow or both are NaN."""
    with np.errstate(all="ignore"):
        rounded = want.astype(np.float32)
        unit = np.maximum(np.exp2(np.floor(np.log2(np.abs(want))) - 23), 2.0**-149)
        error = np.abs(got.astype(np.float64) - want) / unit
    agrees = (got == rounded) | (np.isnan(got) & np.isnan(want))
    return np.where(agrees & ~np.isfinite(rounded) | (got == rounded), 0.0, error)


@pytest.mark.parametrize(
    ("operation", "bound", "low", "high"),
    [
        ("exp", 1.0, -np.inf, np.inf),
        ("exp_weight", 1.0, -87.3, 0.0),
        ("tanh", 2.5, -np.inf, np.inf),
        ("silu", 2.5, -88.7, np.inf),
    ],
)
def test_errors_are_within_the_stated_units(operation: Operation, bound: float, low: float, high: float) -> None:
    x = walk(4001)
    error = ulps(run(operation, x), reference(operation, x))
    error = np.where((x >= low) & (x <= high) | np.isnan(x), error, 0.0)
    worst = np.unravel_index(np.nanargmax(np.where(np.isnan(error), np.inf, error)), x.shape)
    assert error[worst] <= bound, f"{operation}({x[worst]!r}) is off by {error[worst]} units"


def test_gelu_is_within_its_bound() -> None:
    x = walk(4001)
    x = x[((x >= -10.05) & (x < 1e6)).all(axis=1)]
    got, want = run("gelu_tanh", x).astype(np.float64), reference("gelu_tanh", x)
    bound = 2e-7 * (1 + np.abs(x.astype(np.float64)) ** 3) * np.abs(want) + 2.0**-149
    assert (np.abs(got - want) <= bound).all()


def test_ends_of_the_range() -> None:
    x = np.zeros((1, 16), np.float32)
    x[0, :6] = [-np.inf, np.inf, np.nan, -0.0, -3e38, 3e38]
    exp = run("exp", x)[0]
    assert list(exp[:2]) == [0.0, np.inf]
    assert np.isnan(exp[2])
    assert list(exp[3:6]) == [1.0, 0.0, np.inf]
    weight = run("exp_weight", x)[0]
    assert weight[0] == 0.0
    assert np.isnan(weight[2])
    assert list(weight[3:5]) == [1.0, 0.0]
    tanh = run("tanh", x)[0]
    assert list(tanh[:2]) == [-1.0, 1.0]
    assert np.isnan(tanh[2])
    assert np.signbit(tanh[3])
    assert list(tanh[4:6]) == [-1.0, 1.0]
    far = np.array([[-88.8, -1e4, -1e30, -3e38] * 4], np.float32)
    assert (run("silu", far) == 0.0).all()
    assert (run("gelu_tanh", far) == 0.0).all()
    near = np.array([[88.8, 1e4, 1e30, 3e38] * 4], np.float32)
    assert (run("silu", near) == near).all()
    assert (run("gelu_tanh", near) == near).all()
    for operation in ("silu", "gelu_tanh"):
        assert np.isnan(run(operation, np.full((1, 16), np.nan, np.float32))).all()


def test_weights_of_a_softmax_never_exceed_one() -> None:
    x = -np.abs(walk(40009))
    weights = run("exp_weight", x)
    assert (weights[~np.isnan(x)] <= 1.0).all()


@pytest.mark.parametrize("isa", [isa for isa in info().usable if isa != "generic"])
@pytest.mark.parametrize("operation", ["exp", "exp_weight", "tanh", "silu", "gelu_tanh"])
def test_the_same_bits_on_every_instruction_set(operation: Operation, isa: str) -> None:
    x = walk(200003)[::8]
    if operation == "exp_weight":
        x = -np.abs(x)
    got, want = run(operation, x, isa), run(operation, x, "generic")
    assert ((got.view(np.uint32) == want.view(np.uint32)) | (np.isnan(got) & np.isnan(want))).all()
