"""Single linear ops of the native library for tests and benches: numpy arrays in, numpy arrays out.

Called by tests/kernels/native/test_linear*.py and bench/ops/linear.py. `isa` names a table of kernels; every function
raises ValueError with the library's sentence where it refuses.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library
from headrace.kernels.native.matrix import MatrixStruct, PackedMatrix, aligned_bytes

Epilogue = Literal["store", "add", "silu_gate", "gelu_gate"]
EPILOGUES: tuple[Epilogue, ...] = ("store", "add", "silu_gate", "gelu_gate")
F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]


class LinearStruct(ctypes.Structure):
    """HrLinear of headrace_native.h."""

    _fields_ = (
        ("activations", ctypes.c_void_p),
        ("activations_bytes", ctypes.c_int64),
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("gated", ctypes.c_void_p),
        ("gated_bytes", ctypes.c_int64),
        ("bits", ctypes.c_int32),
        ("gated_bits", ctypes.c_int32),
        ("epilogue", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
    )


@dataclass(frozen=True, eq=False)
class Quantized:
    """Activations of `rows` x `width` in the kernels' layout (csrc/activations.h)."""

    data: U8
    rows: int
    width: int
    bits: int

    def blocks(self) -> U8:
        """uint8 [fours of rows, groups, bytes of a block]."""
        return self.data.reshape(-1, self.width // 32, 64 + 16 * self.bits)

    def _numbers(self, index: int) -> U8:
        """One of the header's four vectors, uint8 [rows, groups, 4]."""
        header = self.blocks()[..., 16 * index : 16 * index + 16].reshape(-1, self.width // 32, 4, 4)
        return np.ascontiguousarray(header.transpose(0, 2, 1, 3)).reshape(-1, self.width // 32, 4)[: self.rows]

    @property
    def scales(self) -> F32:
        """float32 [rows, groups]."""
        return self._numbers(0).view(np.float32)[..., 0]

    @property
    def scale_sums(self) -> F32:
        """float32 [rows, groups]: scale times the sum of the group's integers."""
        return self._numbers(1).view(np.float32)[..., 0]

    @property
    def neg8_sums(self) -> I32:
        """int32 [2, rows, groups]: -8 times the sum of the group's integers, and of its upper sixteen."""
        return np.stack([self._numbers(2).view(np.int32)[..., 0], self._numbers(3).view(np.int32)[..., 0]])

    def q(self) -> I32:
        """The integers, int32 [rows, width]."""
        raw = np.ascontiguousarray(self.blocks()[..., 64:]).view(np.int8 if self.bits == 8 else np.int16)
        fours, groups, _ = raw.shape
        q = raw.reshape(fours, groups, 8, 4, 4)  # [.., g, row, place]
        if self.bits == 16:
            q = q[..., [0, 2, 1, 3]]
        rows: I32 = q.transpose(0, 3, 1, 2, 4).reshape(fours * 4, self.width)[: self.rows].astype(np.int32)
        return rows

    def dequantize(self) -> npt.NDArray[np.float64]:
        """float64 [rows, width], exact."""
        x: npt.NDArray[np.float64] = self.q().astype(np.float64) * np.repeat(self.scales.astype(np.float64), 32, axis=1)
        return x


def empty_activations(rows: int, width: int, bits: int) -> Quantized:
    """Room for activations, filled with bytes that make NaNs: what is read without being written shows."""
    size = native().hr_activation_bytes(rows, width, bits)
    if size < 0:
        raise ValueError(library.last_error())
    data = aligned_bytes(size)
    data[:] = 0xFF
    return Quantized(data, rows, width, bits)


def quantize(x: F32, bits: int, isa: str) -> Quantized:
    """x, float32 [rows, width], in the kernels' layout."""
    rows, width = x.shape
    to = empty_activations(rows, width, bits)
    _check(
        native().hr_quantize_test(
            isa.encode(), _address(x), x.strides[0] // 4, rows, width, bits, _address(to.data), to.data.nbytes
        )
    )
    return to


def linear(
    x: Quantized | F32,
    matrix: PackedMatrix,
    isa: str,
    *,
    bias: F32 | None = None,
    epilogue: Epilogue = "store",
    out: F32 | None = None,
    gated_bits: int = 0,
    units_per_call: int = 1 << 30,
) -> F32 | Quantized:
    """x @ matrix.T with an epilogue: float32 [rows, outputs], or quantised to `gated_bits`.

    bias: as long as the matrix has rows in panels, in their order. out: what "add" adds to; changed in place.
    """
    spec = matrix.spec
    rows = x.rows if isinstance(x, Quantized) else x.shape[0]
    width = spec.rows // 2 if spec.is_gated else spec.rows
    struct = LinearStruct(num_rows=rows, epilogue=EPILOGUES.index(epilogue))
    if isinstance(x, Quantized):
        struct.activations, struct.activations_bytes, struct.bits = x.data.ctypes.data, x.data.nbytes, x.bits
    else:
        struct.x, struct.x_stride = x.ctypes.data, x.strides[0] // 4
    if bias is not None:
        struct.bias = bias.ctypes.data
    gated = empty_activations(rows, width, gated_bits) if gated_bits else None
    if gated is not None:
        struct.gated, struct.gated_bytes, struct.gated_bits = gated.data.ctypes.data, gated.data.nbytes, gated_bits
    else:
        out = np.full((rows, width), np.nan, np.float32) if out is None else out
        struct.out, struct.out_stride = out.ctypes.data, out.strides[0] // 4
    _check(
        native().hr_linear_test(
            isa.encode(), ctypes.byref(matrix.struct()), ctypes.byref(struct), min(units_per_call, 2**31 - 1)
        )
    )
    if gated is not None:
        return gated
    assert out is not None
    return out


def embed(ids: npt.NDArray[np.int32], table: PackedMatrix, isa: str, scale: float = 1.0) -> F32:
    """Rows of the table, dequantised, times scale: float32 [ids, cols]."""
    out = np.full((len(ids), table.spec.cols), np.nan, np.float32)
    _check(
        native().hr_embed_test(
            isa.encode(), ctypes.byref(table.struct()), _address(ids), len(ids), scale, _address(out), table.spec.cols
        )
    )
    return out


def usable_isas() -> tuple[str, ...]:
    """Tables of kernels that run here, the oracle ("generic") last."""
    return library.info().usable


@cache
def native() -> ctypes.CDLL:
    """The library with the prototypes of the functions for tests."""
    lib = library.load()
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    lib.hr_activation_bytes.argtypes = (i64, i64, i32)
    lib.hr_activation_bytes.restype = i64
    lib.hr_quantize_test.argtypes = (ctypes.c_char_p, pointer, i64, i32, i32, i32, pointer, i64)
    matrix, op = ctypes.POINTER(MatrixStruct), ctypes.POINTER(LinearStruct)
    lib.hr_linear_test.argtypes = (ctypes.c_char_p, matrix, op, i32)
    double = ctypes.POINTER(ctypes.c_double)
    lib.hr_linear_bench.argtypes = (ctypes.c_char_p, matrix, i32, op, i32, i32, double)
    lib.hr_read_bench.argtypes = (pointer, i64, i32, i32, double)
    lib.hr_embed_test.argtypes = (ctypes.c_char_p, matrix, pointer, i32, ctypes.c_float, pointer, i64)
    return lib


def _address(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _check(code: int) -> None:
    if code:
        raise ValueError(library.last_error())
