"""Makes the interpreter compute what a GPU computes. Installed by tests/gpu/interpreter/__init__.py.

The stock interpreter (3.5 to 3.9) keeps bf16 in uint16 and fp8 in uint8 and does arithmetic on the bits; it truncates
where hardware rounds to nearest even; it multiplies float32 exactly where a GPU uses TF32; it gives zero for lanes that
a mask switched off, which on a GPU are undefined. Here: soft types are computed in float32 and rounded once, to nearest
even (fp8: saturating, as cvt.rn.satfinite does); what such lanes hold
is poison; a Python float argument is
a float32 scalar, as on a GPU, and not a constant of the other operand's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as stock

FP8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}
_FP8_TABLE = {
    kind: torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32).numpy() for kind, (dtype, _) in FP8.items()
}
_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)
_POISON_BYTE = 0x55  # integers and bools of undefined lanes: 85, 21845, 1431655765


def is_soft(dtype: Any) -> bool:
    """True for the types that numpy lacks: bf16 (held as uint16) and fp8 (held as uint8)."""
    return dtype.scalar == tl.bfloat16 or dtype.scalar in FP8


def to_float32(data: np.ndarray, dtype: Any) -> np.ndarray:
    """What the bits of a soft type mean; other types as they are."""
    kind = dtype.scalar
    if kind == tl.bfloat16:
        return (np.ascontiguousarray(data).astype(np.uint32) << 16).view(np.float32)
    return _FP8_TABLE[kind][data] if kind in FP8 else data


def from_float32(value: np.ndarray, dtype: Any) -> np.ndarray:
    """Float32 to the bits of `dtype`: round to nearest even; fp8 saturates to its largest finite number, NaN stays."""
    kind = dtype.scalar
    value = np.ascontiguousarray(value, dtype=np.float32)
    if kind == tl.bfloat16:
        bits = value.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(value), np.uint16(0x7FC0), rounded)
    if kind in FP8:
        dtype_torch, largest = FP8[kind]
        clipped = np.clip(value, -largest, largest)  # NaN passes through
        return torch.from_numpy(clipped.reshape(-1)).to(dtype_torch).view(torch.uint8).numpy().reshape(value.shape)
    return value.astype(stock._get_np_dtype(kind))


def round_to_tf32(value: np.ndarray) -> np.ndarray:
    """Float32 with 10 mantissa bits, ties to even: what a tensor core takes under input_precision="tf32"."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(value), rounded.view(np.float32), value)


def handle(data: np.ndarray, dtype: Any) -> Any:
    return stock.TensorHandle(data, dtype.scalar)


# ---- arithmetic


def _binary(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
    if is_soft(left.dtype) and op not in _BITWISE and not isinstance(left.dtype, tl.pointer_type):
        out = op(to_float32(left.data, left.dtype), to_float32(right.data, right.dtype))
        return handle(out if out.dtype == np.bool_ else from_float32(out, left.dtype), left.dtype)
    return _stock_binary(self, left, right, op)


def _ternary(self: Any, first: Any, second: Any, third: Any, op: Callable[..., Any]) -> Any:
    if op is not np.where and is_soft(third.dtype):
        out = op(*(to_float32(item.data, item.dtype) for item in (first, second, third)))
        return handle(from_float32(out, third.dtype), third.dtype)
    return _stock_ternary(self, first, second, third, op)


def _unary(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
    if is_soft(arg.dtype):
        return handle(from_float32(op(to_float32(arg.data, arg.dtype)), arg.dtype), arg.dtype)
    return handle(op(arg.data), arg.dtype)


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """One rounding: products of two floats of 24 bits are exact in double, the sum is off by 2^-53 at most."""
    if z.dtype.scalar == tl.float64:
        return handle(x.data * y.data + z.data, z.dtype)
    wide = [to_float32(item.data, item.dtype).astype(np.float64) for item in (x, y, z)]
    return handle(from_float32((wide[0] * wide[1] + wide[2]).astype(np.float32), z.dtype), z.dtype)


def _maximum(self: Any, left: Any, right: Any) -> Any:
    return self.binary_op(left, right, np.fmax)  # PTX max.f32 drops a NaN; max.NaN.f32 (create_maximumf) keeps it


def _minimum(self: Any, left: Any, right: Any) -> Any:
    return self.binary_op(left, right, np.fmin)


def _dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Sums in double and rounds once: a row's result then depends neither on the tile's other rows nor on BLAS."""
    if a.data.dtype.kind in "iu" and not is_soft(a.dtype):
        out = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.int64)
        return handle((out + acc.data).astype(acc.data.dtype), acc.dtype)
    x, y = to_float32(a.data, a.dtype), to_float32(b.data, b.dtype)
    if a.dtype.scalar == tl.float32 and input_precision == stock._ir.INPUT_PRECISION.TF32:
        x, y = round_to_tf32(x), round_to_tf32(y)
    out = np.matmul(x.astype(np.float64), y.astype(np.float64)) + to_float32(acc.data, acc.dtype)
    return handle(from_float32(out.astype(np.float32), acc.dtype), acc.dtype)


# ---- casts


def _cast(self: Any, src: Any, dst: Any) -> Any:
    source, target = src.dtype.scalar, dst.scalar
    if isinstance(source, tl.pointer_type) or isinstance(target, tl.pointer_type) or source == target:
        return _stock_cast(self, src, dst)
    if source.is_floating() and not target.is_floating():
        return handle(_float_to_int(to_float32(src.data, source), target), target)
    if not (is_soft(source) or is_soft(target)):
        return _stock_cast(self, src, dst)
    value = to_float32(src.data, source).astype(np.float32)
    return handle(from_float32(value, target), target)


def _float_to_int(value: np.ndarray, target: Any) -> np.ndarray:
    """Towards zero; NaN is 0 and what does not fit saturates at 32 or 64 bits, as cvt.rzi does; then the low bits."""
    if target == tl.int1:
        return value != 0
    unsigned = target.is_int_unsigned()
    wide = np.dtype(f"{'u' if unsigned else ''}int{max(32, target.primitive_bitwidth)}")
    limits = np.iinfo(wide)
    whole = np.trunc(np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    inside = (whole >= float(limits.min)) & (whole < float(limits.max) + (wide.itemsize == 4))
    out = np.where(inside, whole, 0).astype(wide)
    out = np.where(inside, out, np.where(whole > 0, wide.type(limits.max), wide.type(limits.min)))
    return out.astype(stock._get_np_dtype(target))


def _fp_to_fp(self: Any, src: Any, dst: Any, rounding_mode: Any) -> Any:
    source, target = src.dtype.scalar, dst.scalar
    value = to_float32(src.data, source).astype(np.float32)
    if rounding_mode == stock._ir.ROUNDING_MODE.RTZ:
        if target != tl.bfloat16:
            # No kernel asks for it, and a guess would be a wrong number: whoever needs it adds it, with a test.
            raise NotImplementedError(f"rounding towards zero to {target} is not emulated")
        return handle((np.ascontiguousarray(value).view(np.uint32) >> 16).astype(np.uint16), target)
    return handle(from_float32(value, target), target)


# ---- constants and arguments


def poison(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What the lanes of a load hold that a mask switched off and that no `other` fills: undefined on a GPU."""
    kind = stock._get_np_dtype(dtype)
    if kind.kind == "f":
        return np.full(shape, np.nan, dtype=kind)
    if is_soft(dtype):
        return np.full(shape, from_float32(np.array([np.nan]), dtype)[0], dtype=kind)
    if kind.kind == "b":
        return np.ones(shape, dtype=kind)
    return np.full(shape, int.from_bytes(bytes([_POISON_BYTE]) * kind.itemsize, "little"), dtype=np.uint64).astype(kind)


def _constant(kind: Any) -> Callable[[Any, float], Any]:
    return lambda self, value: handle(from_float32(np.array([value]), kind), kind)


_stock_convert_argument = stock._implicit_cvt


def _convert_argument(arg: Any) -> Any:
    """A launch argument as the kernel sees it: bool is int1, float is float32 (3.6.0 leaves both to Python)."""
    if isinstance(arg, bool):
        return tl.tensor(handle(np.array([arg], dtype=np.bool_), tl.int1), tl.int1)
    if isinstance(arg, float):
        return tl.tensor(handle(np.array([arg], dtype=np.float32), tl.float32), tl.float32)
    return _stock_convert_argument(arg)


_builder = stock.InterpreterBuilder
_stock_binary, _stock_ternary = _builder.binary_op, _builder.ternary_op
_stock_cast = _builder.cast_impl


def install() -> None:
    methods: dict[str, Any] = {
        "binary_op": _binary,
        "ternary_op": _ternary,
        "unary_op": _unary,
        "create_fma": _fma,
        "create_maxnumf": _maximum,
        "create_minnumf": _minimum,
        "create_dot": _dot,
        "cast_impl": _cast,
        "create_fp_to_fp": _fp_to_fp,
        "get_bf16": _constant(tl.bfloat16),
        "get_fp8e4nv": _constant(tl.float8e4nv),
        "get_fp8e5": _constant(tl.float8e5),
    }
    for name, method in methods.items():
        setattr(_builder, name, method)
    stock._implicit_cvt = _convert_argument
    # Overflow checks only report under debug=True, which our kernels do not use; they double the cost of every add.
    stock.interpreter_builder.options = stock.InterpreterOptions(sanitize_overflow=False)
