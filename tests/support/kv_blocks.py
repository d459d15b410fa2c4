"""Native KV blocks read back in Python: an independent reading of kernels/csrc/layout.h, for the tests of the ops that
write them and read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from headrace.kernels.native.single_ops import KvBlocks

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KvContents:
    """k, v: float64 [num_slots, num_kv_heads, head_dim]; slot s is offset s % block_size of block s // block_size."""

    k: F64
    v: F64


def read_kv_blocks(kv: KvBlocks) -> KvContents:
    """Everything, dequantised; NaN where nothing was written since KvBlocks.empty."""
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "int8": np.int8}[kv.kind]
    blocks = len(kv.data)
    size = kv.head_dim * kv.block_size * np.dtype(dtype).itemsize
    heads = np.ascontiguousarray(kv.data).reshape(blocks, kv.num_kv_heads, -1)
    k = np.ascontiguousarray(heads[:, :, :size]).view(dtype).reshape(blocks, -1, kv.head_dim, kv.block_size)
    v = np.ascontiguousarray(heads[:, :, size : 2 * size]).view(dtype).reshape(blocks, -1, kv.block_size, kv.head_dim)
    keys, values = _widen(k.transpose(0, 3, 1, 2)), _widen(v.transpose(0, 2, 1, 3))
    if kv.kind == "int8":
        scales = np.ascontiguousarray(heads[:, :, 2 * size : 2 * size + 8 * kv.block_size]).view(np.float32)
        scales = scales.reshape(blocks, kv.num_kv_heads, 2, kv.block_size).astype(np.float64)
        keys = keys * scales[:, :, 0].transpose(0, 2, 1)[..., None]
        values = values * scales[:, :, 1].transpose(0, 2, 1)[..., None]
    shape = (blocks * kv.block_size, kv.num_kv_heads, kv.head_dim)
    return KvContents(keys.reshape(shape), values.reshape(shape))


def _widen(array: npt.NDArray[np.generic]) -> F64:
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return array.astype(np.float64)
