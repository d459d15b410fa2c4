"""Weights as the native kernels read them: loaded matrices to panels (kernels/csrc/layout.h); unpack.py is the inverse.

Called by the native executor's loader: `plan_matrix` says what a packed matrix will be, `pack_matrix` fills its bytes.
Several matrices with the same number of columns become one, rows below rows (q, k, v), or gate and up interleaved.

Quantised weights stay as they are where groups are 16 features or a multiple of 32 and there is a multiple of 32
columns; all others are dequantised to dense ones. Those with scales of two levels (GGUF's Q4_K, Q5_K, Q6_K) keep the
bits that the file has, unless they are joined with others. Other scales and zeros are kept as float16 where that is
exact, or rounds each one, a normal number of float16, by no more than 2^-11 of itself; and as float32 where it would
not. Dense weights are kept as bfloat16 or float16 where that is exact, else as float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library
from headrace.kernels.quant import Array, QuantTensor, Weight

MatrixKind = Literal["int4", "int8", "f32", "f16", "bf16", "super4", "super5", "super6"]
ScaleKind = Literal["f16", "f32"]
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# WeightKind of csrc/layout.h
KINDS: tuple[MatrixKind, ...] = ("int4", "int8", "f32", "f16", "bf16", "super4", "super5", "super6")
SCALE_KINDS: tuple[ScaleKind, ...] = ("f16", "f32")  # ScaleKind
ALIGNMENT = 64  # bytes; kAlign
GROUP = 32  # kGroup: features of a block
_F16_NORMAL = np.float32(2.0**-14)  # the smallest normal number of float16
_F16_MAX = np.float32(65504)
_CHUNK = 1 << 20  # scales looked at together


class MatrixStruct(ctypes.Structure):
    """HrMatrix of headrace_native.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("data_bytes", ctypes.c_int64),
        ("panel_bytes", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("scale_kind", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("cols", ctypes.c_int32),
        ("scales_per_block", ctypes.c_int32),
        ("has_zeros", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _PartStruct(ctypes.Structure):
    """HrMatrixPart of headrace_native.h."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("sub_scales", ctypes.c_void_p),
        ("sub_mins", ctypes.c_void_p),
        ("rows", ctypes.c_int32),
        ("group_size", ctypes.c_int32),
    )


@dataclass(frozen=True)
class MatrixSpec:
    """What a packed matrix is, but for its bytes.

    scale_kind, scales_per_block and has_zeros are those of int4 and int8; "f32", 0 and False for all others.
    """

    kind: MatrixKind
    rows: int
    cols: int
    scale_kind: ScaleKind = "f32"
    scales_per_block: int = 0
    has_zeros: bool = False
    is_gated: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether products with it want quantised activations."""
        return self.kind in ("int4", "int8") or self.is_two_level

    @property
    def is_two_level(self) -> bool:
        """Whether scales are integers, with a float16 for 256 features."""
        return self.kind in ("super4", "super5", "super6")

    @property
    def num_panels(self) -> int:
        """Groups of 16 rows, with those that pad."""
        return -(-self.rows // 2 // 32) * 4 if self.is_gated else -(-self.rows // 16)

    @property
    def panel_bytes(self) -> int:
        """Bytes from panel to panel."""
        return self.num_bytes // self.num_panels

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed matrix. ValueError where there is no such matrix."""
        size = int(_library().hr_matrix_bytes(ctypes.byref(self._struct())))
        if size < 0:
            raise ValueError(library.last_error())
        return size

    def _struct(self) -> MatrixStruct:
        return MatrixStruct(
            None,
            0,
            0,
            KINDS.index(self.kind),
            0 if self.is_two_level else SCALE_KINDS.index(self.scale_kind),
            self.rows,
            self.cols,
            self.scales_per_block,
            self.has_zeros,
            self.is_gated,
            0,
        )


@dataclass(frozen=True, eq=False)
class PackedMatrix:
    """A packed matrix: `data`, uint8 [spec.num_bytes], starts on a multiple of ALIGNMENT bytes."""

    spec: MatrixSpec
    data: U8

    def struct(self) -> MatrixStruct:
        """For C++; `data` must outlive its use."""
        struct = self.spec._struct()
        struct.data, struct.data_bytes, struct.panel_bytes = (
            self.data.ctypes.data,
            self.data.nbytes,
            self.spec.panel_bytes,
        )
        return struct


def plan_matrix(weights: Sequence[Weight], *, is_gated: bool = False) -> MatrixSpec:
    """What `weights`, one below the other, become. is_gated: they are gate and up, of equal shape.

    ValueError where they do not fit together: other numbers of columns, or int4 with int8 or with dense weights.
    """
    if is_gated and (len(weights) != 2 or weights[0].shape != weights[1].shape):
        raise ValueError(f"gate and up must have one shape, not {[weight.shape for weight in weights]}")
    rows, cols = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    if any(weight.shape[1] != cols for weight in weights):
        raise ValueError(f"matrices {[weight.shape for weight in weights]} cannot be joined")
    kinds = {_kind(weight) for weight in weights}
    if len(kinds) != 1:
        raise ValueError(f"weights of kinds {', '.join(sorted(kinds))} cannot be joined")
    if kinds == {"dense"}:
        return MatrixSpec(_dense_kind([_dense(weight) for weight in weights]), rows, cols, is_gated=is_gated)
    tensors = [weight for weight in weights if isinstance(weight, QuantTensor)]
    two_level = {_two_level_kind(tensor) for tensor in tensors}
    if len(two_level) == 1 and None not in two_level:
        return MatrixSpec(two_level.pop() or "super4", rows, cols, is_gated=is_gated)
    groups = {tensor.group_size for tensor in tensors}
    numbers = [tensor.scales for tensor in tensors] + [tensor.zeros for tensor in tensors if tensor.zeros is not None]
    return MatrixSpec(
        tensors[0].kind,
        rows,
        cols,
        "f16" if all(_fits_f16(array) for array in numbers) else "f32",
        2 if 16 in groups else 1,
        any(_has_zeros(tensor) for tensor in tensors),
        is_gated,
    )


def pack_matrix(
    weights: Sequence[Weight], *, is_gated: bool = False, spec: MatrixSpec | None = None, out: U8 | None = None
) -> PackedMatrix:
    """Pack `weights` as `spec` says (default: their `plan_matrix`), into `out` where it is given.

    out: uint8 [spec.num_bytes], contiguous, on a multiple of ALIGNMENT bytes. Releases the GIL. ValueError where the
    weights do not fit `spec`.
    """
    spec = plan_matrix(weights, is_gated=is_gated) if spec is None else spec
    size = spec.num_bytes
    out = aligned_bytes(size) if out is None else out
    parts = [_part(weight, spec) for weight in weights]
    structs = (_PartStruct * len(parts))(*(part.struct() for part in parts))
    code = _library().hr_pack_matrix(
        ctypes.byref(spec._struct()), structs, len(parts), ctypes.c_void_p(out.ctypes.data), out.nbytes
    )
    if code:
        raise ValueError(library.last_error())
    return PackedMatrix(spec, out[:size])


def aligned_bytes(size: int) -> U8:
    """uint8 [size], not initialised, on a multiple of ALIGNMENT bytes."""
    block = np.empty(size + ALIGNMENT, np.uint8)
    start = -block.ctypes.data % ALIGNMENT
    return block[start : start + size]


@dataclass(frozen=True, eq=False)
class _Part:
    """Arrays of one part, as C++ reads them; alive while it does."""

    packed: Array
    scales: F32 | None
    zeros: F32 | None
    group_size: int
    sub_scales: Array | None = None
    sub_mins: Array | None = None

    def struct(self) -> _PartStruct:
        arrays = (self.packed, self.scales, self.zeros, self.sub_scales, self.sub_mins)
        addresses = (None if array is None else array.ctypes.data for array in arrays)
        return _PartStruct(*addresses, self.packed.shape[0], self.group_size)


def _part(weight: Weight, spec: MatrixSpec) -> _Part:
    if not spec.is_quantized:
        dense = _dense(weight)
        if spec.kind == "bf16":
            return _Part(np.ascontiguousarray(dense.view(np.uint32) >> np.uint32(16), np.uint16), None, None, 0)
        return _Part(np.ascontiguousarray(dense, np.float16 if spec.kind == "f16" else np.float32), None, None, 0)
    if spec.is_two_level:
        return _two_level_part(weight, spec)
    if not isinstance(weight, QuantTensor) or weight.kind != spec.kind:
        raise ValueError(f"{_kind(weight)} weights cannot be packed as {spec.kind}")
    packed, zeros = np.ascontiguousarray(weight.packed), weight.zeros
    if not _has_zeros(weight):
        shift = 8 + (_symmetric_zero(weight) or -8)
        packed = packed + np.uint8(shift * 0x11) if shift else packed
        zeros = None
    elif zeros is None:  # int4 without zeros is scale * q here and scale * (q - 8) there
        zeros = np.zeros_like(weight.scales)
    zeros = None if zeros is None else np.ascontiguousarray(zeros, np.float32)
    return _Part(packed, np.ascontiguousarray(weight.scales, np.float32), zeros, weight.group_size)


def _two_level_part(weight: Weight, spec: MatrixSpec) -> _Part:
    two = weight.two_level if isinstance(weight, QuantTensor) else None
    if two is None or not isinstance(weight, QuantTensor) or _two_level_kind(weight) != spec.kind:
        raise ValueError(f"{_kind(weight)} weights cannot be packed as {spec.kind}")
    return _Part(
        np.ascontiguousarray(weight.packed),
        np.ascontiguousarray(two.d, np.float32),
        None if two.dmin is None else np.ascontiguousarray(two.dmin, np.float32),
        weight.group_size,
        np.ascontiguousarray(two.sub_scales),
        None if two.sub_mins is None else np.ascontiguousarray(two.sub_mins),
    )


def _two_level_kind(tensor: QuantTensor) -> MatrixKind | None:
    """The kind that keeps the scales of two levels, or None where the tensor has none."""
    if tensor.two_level is None:
        return None
    if tensor.kind == "int4":
        return "super4"
    return "super6" if tensor.zeros is None else "super5"


def _kind(weight: Weight) -> str:
    """ "int4", "int8" or "dense": what a weight is packed as."""
    if not isinstance(weight, QuantTensor) or weight.shape[1] % GROUP:
        return "dense"
    return weight.kind if weight.group_size == 16 or weight.group_size % GROUP == 0 else "dense"


def _dense(weight: Weight) -> F32:
    dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return np.ascontiguousarray(dense, np.float32)


def _dense_kind(arrays: Sequence[F32]) -> MatrixKind:
    """The narrowest kind that holds all values exactly."""
    if all(_each(array, lambda part: not (part.view(np.uint32) & np.uint32(0xFFFF)).any()) for array in arrays):
        return "bf16"
    with np.errstate(over="ignore"):
        if all(_each(array, lambda part: np.array_equal(part, part.astype(np.float16))) for array in arrays):
            return "f16"
    return "f32"


def _has_zeros(tensor: QuantTensor) -> bool:
    """Whether a tensor needs zeros once packed, where int4 without zeros means scale * (q - 8)."""
    if tensor.kind == "int8":
        return tensor.zeros is not None
    return _symmetric_zero(tensor) is None


def _symmetric_zero(tensor: QuantTensor) -> int | None:
    """z in -8..-1 where every zero of an int4 tensor is z * scale and q + z + 8 fits 4 bits: Q4_0 (-8), Q3_K (-4).

    None where not, or where scale * q + zero might round and so differ from scale * (q + z).
    """
    zeros, scales = tensor.zeros, tensor.scales
    if zeros is None:
        return None
    nonzero = np.flatnonzero(scales.ravel()[:4096])
    if not nonzero.size:
        return None
    ratio = float(zeros.flat[nonzero[0]]) / float(scales.flat[nonzero[0]])
    if ratio not in range(-8, 0):
        return None
    if (np.ascontiguousarray(scales).view(np.uint32) & np.uint32(0xF)).any():  # 20 bits times 4 are exact
        return None
    if not np.array_equal(zeros, scales * np.float32(ratio)):
        return None
    room = np.uint8(15 - (8 + int(ratio)))
    if (tensor.packed & np.uint8(0xF)).max() > room or (tensor.packed >> np.uint8(4)).max() > room:
        return None
    return int(ratio)


def _fits_f16(numbers: F32) -> bool:
    """Whether every number is one of float16, or rounds to a normal one (then by at most 2^-11 of itself)."""

    def fits(part: F32) -> bool:
        size = np.abs(part)
        if ((size == 0) | ((size >= _F16_NORMAL) & (size <= _F16_MAX))).all():
            return True
        with np.errstate(over="ignore"):
            exact = part.astype(np.float16).astype(np.float32) == part
        return bool((exact | ((size >= _F16_NORMAL) & (size <= _F16_MAX))).all())

    return _each(numbers, fits)


def _each(array: F32, holds: Callable[[F32], bool]) -> bool:
    """Whether `holds` is true of all parts of the array, looked at while they are in the cache."""
    flat = np.ascontiguousarray(array).ravel()
    return all(holds(flat[start : start + _CHUNK]) for start in range(0, flat.size, _CHUNK))


def _address(array: Array) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _check(code: int) -> None:
    if code:
        raise ValueError(library.last_error())


@cache
def _library() -> ctypes.CDLL:
    """The native library with the prototypes of what is called here."""
    native = library.load()
    matrix, pointer = ctypes.POINTER(MatrixStruct), ctypes.c_void_p
    native.hr_matrix_bytes.argtypes = (matrix,)
    native.hr_matrix_bytes.restype = ctypes.c_int64
    native.hr_pack_matrix.argtypes = (matrix, ctypes.POINTER(_PartStruct), ctypes.c_int32, pointer, ctypes.c_int64)
    native.hr_pack_matrix.restype = ctypes.c_int
    return native
