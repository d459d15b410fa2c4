"""The sixteen lanes: every operation means what numpy says in plain C++, and the same bits on every instruction set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from headrace.kernels.native.lanes import OPERATIONS, Operation, lanes
from headrace.kernels.native.library import info

FAST_ISAS = [isa for isa in info().usable if isa != "generic"]
U32 = npt.NDArray[np.uint32]

# Bit patterns where float32 arithmetic and conversions turn: zeros, subnormals, halves, powers of two, the ends of
# fp16 and float32, infinities and NaN.
# fmt: off
EDGES = np.array(
    [
        0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x33000000, 0x33000001, 0x33800000, 0x387FC000, 0x387FE000,
        0x38800000, 0x3EFFFFFF, 0x3F000000, 0x3F7FFFFF, 0x3F800000, 0x3F801000, 0x3F803000, 0x3F808000, 0x3F818000,
        0x3FC00000, 0x40200000, 0x40600000, 0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x4AFFFFFF, 0x4B000001,
        0x4EFFFFFF, 0x7F7F8000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000,
    ],
    np.uint32,
)
# fmt: on


def edge_floats() -> npt.NDArray[np.float32]:
    """[n, 16]: edges of both signs and random bit patterns, in random order."""
    rng = np.random.default_rng(1)
    bits = np.concatenate([EDGES, EDGES | 0x80000000, rng.integers(0, 1 << 32, 192, np.uint32)])
    return np.concatenate([rng.permutation(bits) for _ in range(16)]).view(np.float32).reshape(-1, 16)


def integral_floats(low: int, high: int) -> npt.NDArray[np.float32]:
    values = np.arange(low, high + 1)
    return np.resize(values, -(-len(values) // 16) * 16).astype(np.float32).reshape(-1, 16)


def operands(operation: Operation) -> tuple[npt.NDArray[np.generic], ...]:
    """a, b, c for which the operation is defined."""
    rng = np.random.default_rng(2)
    a = edge_floats()
    b = rng.permutation(a.ravel()).reshape(a.shape)
    if operation in ("fma", "fnma"):
        return a, b, rng.permutation(a.ravel()).reshape(a.shape)
    if operation in ("load_masked", "store_masked", "select"):
        return a, b, rng.integers(0, 1 << 16, (len(a), 1), np.uint16)
    if operation == "exp2_int":
        return (integral_floats(-127, 127),)
    if operation in ("load_f16", "load_bf16"):
        return (np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16),)
    if operation == "load_i8":
        return (np.resize(np.arange(-128, 128, dtype=np.int8), 256).reshape(-1, 16),)
    if operation == "store_i8":
        return (integral_floats(-128, 127),)
    if operation == "load_i32":
        return (rng.integers(-(1 << 31), 1 << 31, (64, 16), np.int32),)
    if operation == "store_i32":
        steps = rng.integers(-8, 8, (64, 16)) / 4.0
        return ((rng.integers(-(1 << 20), 1 << 20, (64, 16)) + steps).astype(np.float32),)
    return a, b


RESULT_DTYPES: dict[str, type[np.generic]] = {"store_f16": np.float16, "store_bf16": np.uint16, "store_i8": np.int8}


def result(operation: Operation, isa: str, *arrays: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    dtype = RESULT_DTYPES.get(operation, np.int32 if operation == "store_i32" else np.float32)
    return lanes(operation, *arrays, isa=isa).view(dtype)[:, :16]


def assert_same(got: npt.NDArray[np.generic], want: npt.NDArray[np.generic]) -> None:
    """The same bits; any NaN equals any NaN."""
    assert got.dtype == want.dtype
    width = np.dtype(f"u{got.dtype.itemsize}")
    same = np.ascontiguousarray(got).view(width) == np.ascontiguousarray(want).view(width)
    if got.dtype.kind == "f":
        same |= np.isnan(got) & np.isnan(want)
    where = np.argwhere(~same)
    assert not len(where), f"{len(where)} differ, first at {where[0]}: {got[~same][0]!r}, not {want[~same][0]!r}"


@pytest.mark.parametrize("isa", FAST_ISAS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_instruction_set_gives_the_bits_of_plain_c(operation: Operation, isa: str) -> None:
    arrays = operands(operation)
    assert_same(result(operation, isa, *arrays), result(operation, "generic", *arrays))


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div", "abs", "copysign", "round_even"])
def test_arithmetic_is_ieee(operation: Operation) -> None:
    a, b = operands(operation)
    with np.errstate(all="ignore"):
        want = {
            "add": lambda: a + b,
            "sub": lambda: a - b,
            "mul": lambda: a * b,
            "div": lambda: a / b,
            "abs": lambda: np.abs(a),
            "copysign": lambda: np.copysign(a, b),
            "round_even": lambda: np.rint(a),
        }[operation]()
    assert_same(result(operation, "generic", a, b), want)


def test_multiply_adds_are_fused() -> None:
    a = np.full((1, 16), 1 + 2.0**-12, np.float32)
    exact = 2.0**-24  # a a = 1 + 2^-11 + 2^-24: the last term is lost where the product is rounded
    minus = np.full((1, 16), -(1 + 2.0**-11), np.float32)
    assert (result("fma", "generic", a, a, minus) == exact).all()
    assert (result("fnma", "generic", a, a, -minus) == -exact).all()


@pytest.mark.parametrize(("operation", "wins"), [("max", np.greater), ("min", np.less)])
def test_the_second_operand_wins_unless_the_first_is_beyond_it(operation: Operation, wins: np.ufunc) -> None:
    a, b = operands(operation)
    assert_same(result(operation, "generic", a, b), np.where(wins(a, b), a, b))


def test_masks_choose_lanes() -> None:
    a, b, mask = operands("select")
    chosen = (mask >> np.arange(16)) & 1 == 1
    assert_same(result("select", "generic", a, b, mask), np.where(chosen, a, b))
    assert_same(result("load_masked", "generic", a, b, mask), np.where(chosen, a, np.float32(0)))
    untouched = np.array(0xFFFFFFFF, np.uint32).view(np.float32)
    assert_same(result("store_masked", "generic", a, b, mask), np.where(chosen, a, untouched))


def test_every_half_is_widened() -> None:
    (halves,) = operands("load_f16")
    assert_same(result("load_f16", "generic", halves), halves.view(np.float16).astype(np.float32))


@pytest.mark.parametrize("isa", info().usable)
def test_every_half_and_the_floats_between_two_are_narrowed_to_the_nearest(isa: str) -> None:
    with np.errstate(all="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        finite = halves[np.isfinite(halves)]
        between = (finite + np.nextafter(finite.astype(np.float16), np.float16(np.inf)).astype(np.float32)) / 2
        floats = np.concatenate([halves, between, np.nextafter(between, np.float32(np.inf)), edge_floats().ravel()])
        floats = np.resize(floats, -(-len(floats) // 16) * 16).reshape(-1, 16)
        assert_same(result("store_f16", isa, floats), floats.astype(np.float16))


def test_bfloat16_rounds_to_the_nearest_even_and_keeps_nan() -> None:
    (halves,) = operands("load_bf16")
    assert_same(result("load_bf16", "generic", halves), (halves.astype(np.uint32) << np.uint32(16)).view(np.float32))
    floats = edge_floats()
    bits = floats.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    want = np.where(np.isnan(floats), np.uint16(0x7FC0), rounded)
    assert_same(result("store_bf16", "generic", floats), want)


def test_integers_convert() -> None:
    (bytes_,) = operands("load_i8")
    assert_same(result("load_i8", "generic", bytes_), bytes_.astype(np.float32))
    (integral,) = operands("store_i8")
    assert_same(result("store_i8", "generic", integral), integral.astype(np.int8))
    (ints,) = operands("load_i32")
    assert_same(result("load_i32", "generic", ints), ints.astype(np.float32))
    (floats,) = operands("store_i32")
    assert_same(result("store_i32", "generic", floats), np.rint(floats).astype(np.int32))


def test_powers_of_two() -> None:
    n = integral_floats(-127, 127)
    with np.errstate(all="ignore"):
        want = np.where(n == -127, np.float32(0), np.ldexp(np.float32(1), n.astype(np.int32)))
    assert_same(result("exp2_int", "generic", n), want)


def test_lanes_are_summed_by_one_tree() -> None:
    rng = np.random.default_rng(3)
    a = (rng.standard_normal((200, 16)) * np.exp2(rng.integers(-20, 20, (200, 16)))).astype(np.float32)
    total, largest = a, a
    while total.shape[1] > 1:
        half = total.shape[1] // 2
        total, largest = total[:, :half] + total[:, half:], np.maximum(largest[:, :half], largest[:, half:])
    assert_same(result("sum", "generic", a)[:, :1], total)
    assert_same(result("max_lane", "generic", a)[:, :1], largest)


def test_an_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="sse1"):
        lanes("add", np.zeros((1, 16), np.float32), isa="sse1")
