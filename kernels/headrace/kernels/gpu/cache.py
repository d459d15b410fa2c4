"""The KV blocks on the device. Made by `executor.py` once the memory for them is known."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from headrace.kernels.program import KvLayout

COMPUTE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, eq=False)
class LayerCache:
    """k, v: [num_blocks + 1, num_kv_heads, block_size, head_dim], the last block the null block. k_scale, v_scale:
    float32 [num_kv_heads] where keys and values have 8 bits: what is stored is value / scale."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None


def storage_dtype(kv_dtype: str, capability: tuple[int, int] | None) -> torch.dtype:
    """The type of the cache's tensors; GPUs older than sm_89 know no fp8 type and keep its bits. capability None: not
    a GPU."""
    if kv_dtype == "fp8":
        return torch.uint8 if capability is not None and capability < (8, 9) else torch.float8_e4m3fn
    return torch.int8 if kv_dtype == "int8" else COMPUTE[kv_dtype]


@dataclass(frozen=True, eq=False)
class KvScales:
    """float32 [num_kv_heads] each."""

    k: torch.Tensor
    v: torch.Tensor


_LARGEST = {"fp8": 448.0, "int8": 127.0}
_ALIGN = 256  # bytes, as torch's own allocations begin
_MARGIN = 1.25  # over the largest of the text that was looked at; what is larger still saturates


def scales_of(cache: LayerCache, kv_dtype: str) -> KvScales:
    """Scales that let 8 bits hold everything in a cache of the compute dtype, and a little more."""

    def scale(values: torch.Tensor) -> torch.Tensor:
        largest = values.float().abs().amax(dim=(0, 2, 3)) * (_MARGIN / _LARGEST[kv_dtype])
        return largest.clamp_(min=1e-6).nan_to_num_(1.0)

    return KvScales(scale(cache.k), scale(cache.v))


def allocate(
    layouts: tuple[KvLayout, ...],
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    scales: list[KvScales] | None = None,
) -> list[LayerCache]:
    """Views of one allocation, so that one launch reaches all layers (`kv_blocks`). Zeroed: a block that was never
    written holds no NaN, and neither does the null block. scales: of each layer, for dtypes of 8 bits."""
    shapes = [(num_blocks + 1, layout.num_kv_heads, block_size, layout.head_dim) for layout in layouts]
    sizes = [math.prod(shape) * dtype.itemsize for shape in shapes for _ in "kv"]
    *starts, end = accumulate((-(-size // _ALIGN) * _ALIGN for size in sizes), initial=0)
    memory = torch.zeros(end, dtype=torch.uint8, device=device)
    caches = []
    for index, shape in enumerate(shapes):
        k, v = (
            memory[starts[part] : starts[part] + sizes[part]].view(dtype).view(shape)
            for part in (2 * index, 2 * index + 1)
        )
        k_scale = None if scales is None else scales[index].k
        v_scale = None if scales is None else scales[index].v
        caches.append(LayerCache(k, v, k_scale, v_scale))
    return caches
