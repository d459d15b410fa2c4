"""Packed matrices back to weights: the inverse of `matrix.pack_matrix`, for tests and for whoever wants to look."""

from __future__ import annotations

import ctypes
from functools import cache

import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library
from headrace.kernels.native.matrix import F32, GROUP, MatrixStruct, PackedMatrix
from headrace.kernels.quant import SUPER, Array, QuantKind, QuantTensor, TwoLevel, Weight


class _UnpackedStruct(ctypes.Structure):
    """HrUnpackedMatrix of headrace_native.h."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("packed", "scales", "zeros", "sub_scales", "sub_mins"))


def unpack_matrix(matrix: PackedMatrix) -> Weight:
    """The weights again: a QuantTensor in groups of 16 or 32, or a dense array (bfloat16 widened to float32).

    Scales that were rounded stay so. Joined matrices come as one, gate above up.
    """
    spec = matrix.spec
    rows, cols = spec.rows, spec.cols
    if not spec.is_quantized:
        dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[spec.kind]
        dense: Array = np.empty((rows, cols), dtype)
        _unpack(matrix, dense)
        if spec.kind == "bf16":
            widened: F32 = (dense.astype(np.uint32) << np.uint32(16)).view(np.float32)
            return widened
        return dense
    if spec.is_two_level:
        return _unpack_two_level(matrix)
    group = GROUP // spec.scales_per_block
    packed: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    packed = np.empty((rows, cols // 2), np.uint8) if spec.kind == "int4" else np.empty((rows, cols), np.int8)
    scales = np.empty((rows, cols // group), np.float32)
    zeros = np.empty_like(scales) if spec.has_zeros else None
    _unpack(matrix, packed, scales, zeros)
    if zeros is None and spec.kind == "int4":
        zeros = scales * np.float32(-8)  # QuantTensor's int4 is 0..15
    return QuantTensor("int4" if spec.kind == "int4" else "int8", packed, scales, zeros, group)


def _unpack_two_level(matrix: PackedMatrix) -> QuantTensor:
    rows, cols, is_signed = matrix.spec.rows, matrix.spec.cols, matrix.spec.kind == "super6"
    kind: QuantKind = "int4" if matrix.spec.kind == "super4" else "int8"
    packed: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    packed = np.empty((rows, cols // 2), np.uint8) if kind == "int4" else np.empty((rows, cols), np.int8)
    group = 16 if is_signed else 32
    d = np.empty((rows, cols // SUPER), np.float32)
    dmin = None if is_signed else np.empty_like(d)
    sub_scales = np.empty((rows, cols // group), np.int8 if is_signed else np.uint8)
    sub_mins = None if is_signed else np.empty((rows, cols // group), np.uint8)
    _unpack(matrix, packed, d, dmin, sub_scales, sub_mins)
    per_super = SUPER // group
    scales = np.repeat(d, per_super, axis=1) * sub_scales
    zeros = None if dmin is None or sub_mins is None else -(np.repeat(dmin, per_super, axis=1) * sub_mins)
    dmin16 = None if dmin is None else dmin.astype(np.float16)
    return QuantTensor(kind, packed, scales, zeros, group, TwoLevel(d.astype(np.float16), dmin16, sub_scales, sub_mins))


def _unpack(matrix: PackedMatrix, *arrays: Array | None) -> None:
    """Fill the arrays of HrUnpackedMatrix, in its order; None where there is nothing."""
    to = _UnpackedStruct(*(None if array is None else array.ctypes.data for array in arrays))
    if _library().hr_unpack_matrix(ctypes.byref(matrix.struct()), ctypes.byref(to)):
        raise ValueError(library.last_error())


@cache
def _library() -> ctypes.CDLL:
    """The native library with the prototype of what is called here."""
    native = library.load()
    native.hr_unpack_matrix.argtypes = (ctypes.POINTER(MatrixStruct), ctypes.POINTER(_UnpackedStruct))
    native.hr_unpack_matrix.restype = ctypes.c_int
    return native
