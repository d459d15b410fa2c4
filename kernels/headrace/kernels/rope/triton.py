"""Rotary embedding, QK-norm and the write into the KV blocks, in one launch.

Called by the GPU executor where the epilogue of the qkv product does not do it: prefill, head_dim 80 and 96. Every rope
scaling (linear, llama3, YaRN, ...) reaches this kernel as inv_freq and attention_factor alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from headrace.kernels.rope.triton_kernel import rope_kv_kernel

QUANTIZED = (torch.int8, torch.uint8, torch.float8_e4m3fn)


@dataclass(frozen=True)
class RopeConfig:
    """heads: heads per program, a power of two. num_warps: warps per program."""

    heads: int
    num_warps: int


def default_config(head_dim: int, num_kv_heads: int) -> RopeConfig:
    """Heads such that a thread moves 8 elements of each half, in one or two warps: a function of shapes alone."""
    half = triton.next_power_of_2(head_dim // 2)
    heads = max(256 // half, min(triton.next_power_of_2(num_kv_heads), 512 // half))
    return RopeConfig(heads, heads * half // 256)


def rope_kv(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    *,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    inv_freq: torch.Tensor | None,
    attention_factor: float,
    head_dim: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    config: RopeConfig | None = None,
) -> None:
    """Norm (where given) and turn the heads of q in place; norm, turn and write k, and write v, into their slots.

    q: [T, H * head_dim], k, v: [T, Hk * head_dim], float16, bfloat16 or float32, rows of any stride (views of one qkv
    buffer); k and v are left as they are. Without q, or without k, v and the caches, only the rest is done.
    k_cache, v_cache: [blocks, Hk, block_size, head_dim], dense along head_dim, in a float type, or int8, float8_e4m3fn
    or uint8 (its bits) with k_scale, v_scale float32 [Hk]: what is kept is k / k_scale. positions, slot_mapping: int32
    [T]; the slots of one call differ, except those of the null block. inv_freq: float32 [head_dim / 2], None: nothing
    is turned. q_norm, k_norm: [head_dim].
    """
    _check_rows(positions, slot_mapping, head_dim, inv_freq, q_norm, k_norm)
    num_tokens = positions.shape[0]
    num_heads = 0 if q is None else _check_heads("q", q, num_tokens, head_dim)
    num_kv_heads = 0
    if k_cache is not None or k is not None or v is not None:
        num_kv_heads = _check_kv(k, v, k_cache, v_cache, num_tokens, head_dim, k_scale, v_scale)
    if num_tokens == 0 or num_heads + num_kv_heads == 0:
        return
    config = default_config(head_dim, num_kv_heads or num_heads) if config is None else config
    query_programs, kv_programs = triton.cdiv(num_heads, config.heads), triton.cdiv(num_kv_heads, config.heads)
    rope_kv_kernel[(num_tokens, query_programs + 2 * kv_programs)](
        q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq, attention_factor, q_norm, k_norm, eps, k_scale,
        v_scale,
        *(0 if rows is None else rows.stride(0) for rows in (q, k, v)),
        *((0, 0, 0) if k_cache is None else k_cache.stride()[:3]),
        *((0, 0, 0) if v_cache is None else v_cache.stride()[:3]),
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=1 if k_cache is None else k_cache.shape[2],
        HEADS=config.heads,
        BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=config.num_warps,
    )  # fmt: skip


def _check_rows(
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    head_dim: int,
    inv_freq: torch.Tensor | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
) -> None:
    for name, tensor in (("positions", positions), ("slot_mapping", slot_mapping)):
        if tensor.shape != positions.shape or tensor.ndim != 1 or tensor.dtype != torch.int32:
            raise ValueError(f"rope_kv: {name} {tuple(tensor.shape)} {tensor.dtype}: want int32, one per row")
    if inv_freq is not None and (inv_freq.shape != (head_dim // 2,) or inv_freq.dtype != torch.float32):
        raise ValueError(f"rope_kv: inv_freq {tuple(inv_freq.shape)} {inv_freq.dtype}: want float32 [{head_dim // 2}]")
    for weight in (q_norm, k_norm):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"rope_kv: norm weight {tuple(weight.shape)}: want [{head_dim}]")


def _check_heads(name: str, x: torch.Tensor, num_tokens: int, head_dim: int) -> int:
    if x.ndim != 2 or x.shape[0] != num_tokens or x.shape[1] % head_dim or head_dim % 2 or x.stride(1) != 1:
        raise ValueError(
            f"rope_kv: {name} {tuple(x.shape)}, strides {x.stride()}: want {num_tokens} dense rows, heads of {head_dim}"
        )
    return x.shape[1] // head_dim


def _check_kv(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    k_cache: torch.Tensor | None,
    v_cache: torch.Tensor | None,
    num_tokens: int,
    head_dim: int,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> int:
    if k is None or v is None or k_cache is None or v_cache is None:
        raise ValueError("rope_kv: k, v, k_cache and v_cache go together")
    num_kv_heads = _check_heads("k", k, num_tokens, head_dim)
    shape = (*k_cache.shape[:1], num_kv_heads, *k_cache.shape[2:3], head_dim)
    for cache in (k_cache, v_cache):
        if cache.shape != shape or cache.stride(3) != 1 or cache.dtype != k_cache.dtype:
            raise ValueError(
                f"rope_kv: cache {tuple(cache.shape)} {cache.dtype}: want [_, {num_kv_heads}, _, {head_dim}]"
            )
    if _check_heads("v", v, num_tokens, head_dim) != num_kv_heads:
        raise ValueError(f"rope_kv: k {tuple(k.shape)} and v {tuple(v.shape)} differ")
    for scale in (k_scale, v_scale):
        if (scale is not None) != (k_cache.dtype in QUANTIZED):
            raise ValueError(f"rope_kv: k_scale and v_scale go with a quantised cache, this one is {k_cache.dtype}")
        if scale is not None and (scale.shape != (num_kv_heads,) or scale.dtype != torch.float32):
            raise ValueError(f"rope_kv: scale {tuple(scale.shape)} {scale.dtype}: want float32 [{num_kv_heads}]")
    return num_kv_heads
