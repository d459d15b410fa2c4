"""The native kernels' operations on 16 lanes, one by one: for the tests that hold every instruction set to one meaning.

kernels/csrc/simd.h says what they are. Nothing that serves calls this file.
"""

from __future__ import annotations

import ctypes
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library

U8 = npt.NDArray[np.uint8]

# HrLaneOperation of headrace_native.h, in its order.
Operation = Literal[
    "load_masked",
    "store_masked",
    "add",
    "sub",
    "mul",
    "div",
    "fma",
    "fnma",
    "max",
    "min",
    "abs",
    "copysign",
    "select",
    "round_even",
    "exp2_int",
    "load_f16",
    "store_f16",
    "load_bf16",
    "store_bf16",
    "load_i8",
    "store_i8",
    "load_i32",
    "store_i32",
    "sum",
    "max_lane",
    "exp",
    "exp_weight",
    "tanh",
    "silu",
    "gelu_tanh",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_VECTOR_BYTES = 64


def lanes(
    operation: Operation, a: npt.ArrayLike, b: npt.ArrayLike = 0, c: npt.ArrayLike = 0, *, isa: str | None = None
) -> U8:
    """The operation on vectors of 16 lanes, with the kernels of `isa` (None: those in use).

    a, b, c: [n, 16], of the dtype that the operation reads; masks are uint16 [n, 1], in c. Operands that it does not
    read may be left out. Returns uint8 [n, 64]: what it wrote, and 255 where it wrote nothing. Raises ValueError.
    """
    first = np.asarray(a)
    arrays = [_vectors(array, len(first)) for array in (first, b, c)]
    out = np.full((len(first), _VECTOR_BYTES), 255, np.uint8)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (*arrays, out)]
    name = None if isa is None else isa.encode()
    function = library.load().hr_lanes_test
    if function(name, OPERATIONS.index(operation), *pointers, ctypes.c_int64(len(first))) < 0:
        raise ValueError(library.last_error())
    return out


def _vectors(array: npt.ArrayLike, count: int) -> U8:
    padded = np.zeros((count, _VECTOR_BYTES), np.uint8)
    values = np.asarray(array)
    if values.ndim == 2:
        own = np.ascontiguousarray(values).view(np.uint8)
        padded[:, : own.shape[1]] = own
    return padded
