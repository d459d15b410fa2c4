"""Shapes of the models that kernels are compiled for, and their weights without storage. Called by cases and audit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from headrace.kernels.linear.layout import TILE, block_layout
from headrace.kernels.linear.pack import SCALE_WORDS, PackedLinear

from tests.gpu.aot.targets import Target


@dataclass(frozen=True)
class ModelShape:
    """One GPU's share of a model: heads, KV heads, ffn and vocabulary already divided by `tensor parallel` ranks."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    layers: int
    has_qk_norm: bool = False

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def qkv(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim


SMOLLM2 = ModelShape("smollm2-135m", 576, 1536, 9, 3, 64, 49152, 30)
LLAMA_8B = ModelShape("llama-3-8b", 4096, 14336, 32, 8, 128, 128256, 32)
QWEN3_32B = ModelShape("qwen3-32b", 5120, 25600, 64, 8, 128, 151936, 64, has_qk_norm=True)
LLAMA_70B_TP4 = ModelShape("llama-3-70b-tp4", 8192, 28672 // 4, 64 // 4, 8 // 4, 128, 128256 // 4, 80)
MODELS = (SMOLLM2, LLAMA_8B, QWEN3_32B, LLAMA_70B_TP4)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor with everything but storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def has_fp8(target: Target) -> bool:
    """Whether float8_e4m3fn is a type of the target: sm_89 and newer (gfx942 has another fp8)."""
    return isinstance(target.arch, int) and target.arch >= 89


def weight(kind: str, n: int, k: int, *, is_gated: bool = False, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
    """A packed matrix [n, k] on meta. kind: "int4-g32z" (groups of 32 with zeros), "int8-g32", "dense", "w8a8" ..."""
    rows = (n // 2, n // 2) if is_gated else (n,)
    name, _, group = kind.partition("-g")
    if name in ("int4", "int8"):
        size = int(group.rstrip("z"))
        layout = block_layout(name, size)
        tiles, blocks = -(-n // TILE), -(-k // layout.block_k)
        scales = meta(tiles, blocks, TILE, dtype=SCALE_WORDS[layout.groups])
        tensors = {"words": meta(tiles, blocks, TILE, layout.words, dtype=torch.int16), "scales": scales}
        if group.endswith("z"):
            tensors["zeros"] = torch.empty_like(scales)
        return PackedLinear(name, (n, k), rows, size, is_gated, dtype, tensors)  # type: ignore[arg-type]
    stored = {"dense": dtype, "w8a8": torch.int8}.get(name, torch.float8_e4m3fn)
    tensors = {"weight": meta(n, k, dtype=stored)}
    if name == "fp8_block":
        tensors["scales"] = meta(-(-n // 128), -(-k // 128), dtype=torch.float32)
    elif name != "dense":
        tensors["scales"] = meta(n, dtype=torch.float32)
    return PackedLinear(name, (n, k), rows, 0, is_gated, dtype, tensors)  # type: ignore[arg-type]
