"""What the product of q, k and v does with a finished tile: one head of BLOCK_M rows, normed, turned and kept.

Called by `triton_packed.py` and `triton_direct.py`; the arithmetic is `headrace.kernels.rope.triton_math`'s.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from headrace.kernels.linear.triton_tile import add_bias, scale_rows
from headrace.kernels.rope.triton_math import cos_sin, rotate, slot_offset, to_cache

HAS_ROTATION = tl.constexpr(1)
HAS_HEAD_NORM = tl.constexpr(2)
HAS_CACHE_SCALE = tl.constexpr(4)


class Heads(NamedTuple):
    """`epilogue.RopeKvEpilogue` as the kernels take it. What is absent is any other tensor; FLAGS say what is there."""

    k_cache: Any
    v_cache: Any
    positions: Any
    slot_mapping: Any
    inv_freq: Any
    attention_factor: Any
    q_norm: Any
    k_norm: Any
    eps: Any
    k_scale: Any
    v_scale: Any
    num_heads: Any
    num_kv_heads: Any
    null_block: Any  # the number of the block that is not written
    stride_kb: Any
    stride_kh: Any
    stride_ks: Any
    stride_vb: Any
    stride_vh: Any
    stride_vs: Any


@triton.jit
def finish_head(
    acc,
    squares,
    x_scale,
    out,
    bias,
    heads,
    head,
    first_m,
    M,
    K,
    num_rows,
    stride_out,
    eps,
    HAS_NORM: tl.constexpr,
    FLAGS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """acc: float32 [head_dim, BLOCK_M], the sums of one head; head: its number among those of q, k and v."""
    HEAD_DIM: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = HEAD_DIM // 2
    BLOCK_M: tl.constexpr = acc.shape[1]
    acc = scale_rows(acc, squares, x_scale, first_m, M, K, eps, HAS_NORM)
    acc = add_bias(acc, bias, head * HEAD_DIM, num_rows, num_rows, False)
    m = first_m + tl.arange(0, BLOCK_M)
    column = tl.arange(0, HALF)
    in_m = m < M
    is_q = head < heads.num_heads
    is_v = head >= heads.num_heads + heads.num_kv_heads
    first, second = tl.split(tl.permute(tl.reshape(acc, (2, HALF, BLOCK_M)), (1, 2, 0)))
    if not is_v:
        if HAS_HEAD_NORM & FLAGS:
            factor = tl.rsqrt(sum_rows(first * first + second * second) / HEAD_DIM + heads.eps)[None, :]
            if is_q:
                first, second = _times(first, second, factor, heads.q_norm, HALF)
            else:
                first, second = _times(first, second, factor, heads.k_norm, HALF)
        if HAS_ROTATION & FLAGS:
            position = tl.load(heads.positions + m, mask=in_m, other=0).to(tl.float32)
            cos_value, sin_value = cos_sin(position[None, :] * tl.load(heads.inv_freq + column)[:, None])
            cos_value, sin_value = cos_value * heads.attention_factor, sin_value * heads.attention_factor
            first, second = rotate(first, second, cos_value, sin_value)
    if is_q:
        _keep(out + m.to(tl.int64) * stride_out + head * HEAD_DIM, first, second, None, in_m, 0)
    else:
        slot = tl.load(heads.slot_mapping + m, mask=in_m, other=0)
        is_kept = in_m & (slot // BLOCK_SIZE != heads.null_block)
        if is_v:
            kv_head = head - heads.num_heads - heads.num_kv_heads
            place = heads.v_cache + slot_offset(slot, BLOCK_SIZE, heads.stride_vb, heads.stride_vs)
            _keep(place + kv_head * heads.stride_vh, first, second, heads.v_scale + kv_head, is_kept, FLAGS)
        else:
            kv_head = head - heads.num_heads
            place = heads.k_cache + slot_offset(slot, BLOCK_SIZE, heads.stride_kb, heads.stride_ks)
            _keep(place + kv_head * heads.stride_kh, first, second, heads.k_scale + kv_head, is_kept, FLAGS)


@triton.jit
def _times(first, second, factor, weight, HALF: tl.constexpr):
    column = tl.arange(0, HALF)
    first = first * factor * tl.load(weight + column).to(tl.float32)[:, None]
    second = second * factor * tl.load(weight + HALF + column).to(tl.float32)[:, None]
    return first, second


@triton.jit
def _keep(place, first, second, scale, is_kept, FLAGS: tl.constexpr):
    """The halves [HALF, BLOCK_M] to the slots at `place` [BLOCK_M], in the cache's type."""
    HALF: tl.constexpr = first.shape[0]
    dtype: tl.constexpr = place.dtype.element_ty
    inverse = 1.0
    if HAS_CACHE_SCALE & FLAGS:
        inverse = 1.0 / tl.load(scale)
    place = place[None, :] + tl.arange(0, HALF)[:, None]
    tl.store(place, to_cache(first, inverse, dtype), mask=is_kept[None, :])
    tl.store(place + HALF, to_cache(second, inverse, dtype), mask=is_kept[None, :])


@triton.jit
def sum_rows(values):
    """float32 [R, C] to [C], R a power of two: row i and row i + R / 2, and so on. The order is the same whatever the
    layout, which for tl.sum it is not."""
    ROWS: tl.constexpr = values.shape[0]
    COLS: tl.constexpr = values.shape[1]
    for step in tl.static_range(8):
        if ROWS >> step > 1:
            halves = tl.permute(tl.reshape(values, (2, ROWS >> (step + 1), COLS)), (1, 2, 0))
            a, b = tl.split(halves)
            values = a + b
    return tl.reshape(values, (COLS,))
