"""Rows quantised by the native op that does nothing else: what ops that quantise on their way must agree with."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library


def quantized(x: npt.NDArray[np.float32], bits: int) -> npt.NDArray[np.uint8]:
    """x, float32 [rows, width] with width a multiple of 32, as kernels/csrc/activations.h lays it out."""
    native = library.load()
    native.hr_activation_bytes.restype = ctypes.c_int64
    rows, width = x.shape
    size = native.hr_activation_bytes(ctypes.c_int64(rows), ctypes.c_int64(width), bits)
    block = np.zeros(size + 64, np.uint8)
    out = block[-block.ctypes.data % 64 :][:size]
    source, target = ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(out.ctypes.data)
    stride, out_bytes = ctypes.c_int64(width), ctypes.c_int64(size)
    assert native.hr_quantize_test(None, source, stride, rows, width, bits, target, out_bytes) == 0
    return out
