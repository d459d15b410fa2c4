"""What products take as tuples and flags: heads to turn, a norm to prepare, scales to write, scales of rows. Called by
`triton.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from headrace.kernels.linear.epilogue import NextNorm, RopeKvEpilogue
from headrace.kernels.linear.layout import SQUARES_COLUMNS
from headrace.kernels.linear.triton_heads import HAS_CACHE_SCALE, HAS_HEAD_NORM, HAS_ROTATION, Heads
from headrace.kernels.linear.triton_next_norm import HAS_NEXT_NORM, HAS_SQUARES, NextNormOut, RowSquares
from headrace.kernels.linear.triton_out_scale import (
    HAS_OUT_SCALE,
    ROUNDS_TO_BFLOAT16,
    ROUNDS_TO_FLOAT16,
    OutScale,
)

if TYPE_CHECKING:
    from headrace.kernels.linear.triton import Operands


def tail_of(operands: Operands) -> Heads | NextNormOut | OutScale | None:
    """What a tile is finished with besides bias, activation and residual: the kernels' `heads`."""
    if operands.out_scale is not None:
        return OutScale(operands.out_scale, operands.out_scale.stride(0), operands.out_scale.shape[1])
    if operands.next_norm is not None:
        return _next_norm(operands.next_norm)
    return None if operands.rope_kv is None else _heads(operands.rope_kv)


def row_scale_of(operands: Operands) -> torch.Tensor | RowSquares | None:
    """What the sums of a row are multiplied by: the kernels' `x_scale`."""
    if operands.squares is None:
        return operands.x_scale
    squares, eps = operands.squares
    return RowSquares(squares, squares.stride(0), squares.shape[1], eps)


def flags_of(operands: Operands, dtype: torch.dtype) -> int:
    """HEAD_FLAGS: which of all this is there. dtype: of the product."""
    out_scale = operands.out_scale
    rope_kv = operands.rope_kv
    present: tuple[tuple[Any, object], ...] = (
        (HAS_SQUARES, operands.squares),
        (HAS_NEXT_NORM, operands.next_norm),
        (HAS_OUT_SCALE, out_scale),
        (ROUNDS_TO_FLOAT16, out_scale if dtype == torch.float16 else None),
        (ROUNDS_TO_BFLOAT16, out_scale if dtype == torch.bfloat16 else None),
        (HAS_ROTATION, None if rope_kv is None else rope_kv.inv_freq),
        (HAS_HEAD_NORM, None if rope_kv is None else rope_kv.q_norm),
        (HAS_CACHE_SCALE, None if rope_kv is None else rope_kv.k_scale),
    )
    return sum(int(flag.value) for flag, what in present if what is not None)


def _next_norm(following: NextNorm) -> NextNormOut:
    return NextNormOut(
        weight=following.weight,
        normed=following.normed,
        squares=following.squares,
        stride_normed=following.normed.stride(0),
        stride_squares=following.squares.stride(0),
        num_squares=-(-following.normed.shape[1] // SQUARES_COLUMNS),
    )


def _heads(rope_kv: RopeKvEpilogue) -> Heads:
    absent = rope_kv.positions
    return Heads(
        k_cache=rope_kv.k_cache,
        v_cache=rope_kv.v_cache,
        positions=rope_kv.positions,
        slot_mapping=rope_kv.slot_mapping,
        inv_freq=absent if rope_kv.inv_freq is None else rope_kv.inv_freq,
        attention_factor=rope_kv.attention_factor,
        q_norm=absent if rope_kv.q_norm is None else rope_kv.q_norm,
        k_norm=absent if rope_kv.k_norm is None else rope_kv.k_norm,
        eps=rope_kv.eps,
        k_scale=absent if rope_kv.k_scale is None else rope_kv.k_scale,
        v_scale=absent if rope_kv.v_scale is None else rope_kv.v_scale,
        num_heads=rope_kv.num_heads,
        num_kv_heads=rope_kv.num_kv_heads,
        null_block=rope_kv.k_cache.shape[0] - 1,
        stride_kb=rope_kv.k_cache.stride(0),
        stride_kh=rope_kv.k_cache.stride(1),
        stride_ks=rope_kv.k_cache.stride(2),
        stride_vb=rope_kv.v_cache.stride(0),
        stride_vh=rope_kv.v_cache.stride(1),
        stride_vs=rope_kv.v_cache.stride(2),
    )
