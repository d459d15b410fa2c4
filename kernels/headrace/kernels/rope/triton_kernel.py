# mypy: ignore-errors
"""The kernel of `rope/triton.py`."""

import triton
import triton.language as tl
from headrace.kernels.rope.triton_math import cos_sin, rotate, slot_offset, to_cache


@triton.jit
def rope_kv_kernel(q, k, v, k_cache, v_cache, positions, slot_mapping, inv_freq, attention_factor, q_norm, k_norm, eps,
                   k_scale, v_scale, stride_q, stride_k, stride_v, stride_kb, stride_kh, stride_ks, stride_vb,
                   stride_vh, stride_vs, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
                   BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Program (t, part) moves HEADS heads of row t: first the parts of q, then those of k, then those of v."""
    QUERY_PROGRAMS: tl.constexpr = (NUM_HEADS + HEADS - 1) // HEADS
    KV_PROGRAMS: tl.constexpr = (NUM_KV_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0)
    part = tl.program_id(1)
    row = token.to(tl.int64)
    lane = tl.arange(0, HEADS)
    if NUM_HEADS > 0:
        if part < QUERY_PROGRAMS:
            head = part * HEADS + lane
            source = q + row * stride_q
            first, second = _load(source, head, NUM_HEADS, HEAD_DIM, BLOCK)
            first, second = _turn(
                first, second, token, positions, inv_freq, attention_factor, q_norm, eps, HEAD_DIM, BLOCK
            )
            dtype: tl.constexpr = q.dtype.element_ty
            _store(source, head * HEAD_DIM, head, first.to(dtype), second.to(dtype), NUM_HEADS, HEAD_DIM, BLOCK)
    if NUM_KV_HEADS > 0:
        if part >= QUERY_PROGRAMS + KV_PROGRAMS:
            head = (part - QUERY_PROGRAMS - KV_PROGRAMS) * HEADS + lane
            first, second = _load(v + row * stride_v, head, NUM_KV_HEADS, HEAD_DIM, BLOCK)
            target = v_cache + slot_offset(tl.load(slot_mapping + token), BLOCK_SIZE, stride_vb, stride_vs)
            _write(target, first, second, head, stride_vh, v_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK)
        elif part >= QUERY_PROGRAMS:
            head = (part - QUERY_PROGRAMS) * HEADS + lane
            first, second = _load(k + row * stride_k, head, NUM_KV_HEADS, HEAD_DIM, BLOCK)
            first, second = _turn(
                first, second, token, positions, inv_freq, attention_factor, k_norm, eps, HEAD_DIM, BLOCK
            )
            target = k_cache + slot_offset(tl.load(slot_mapping + token), BLOCK_SIZE, stride_kb, stride_ks)
            _write(target, first, second, head, stride_kh, k_scale, NUM_KV_HEADS, HEAD_DIM, BLOCK)


@triton.jit
def _load(source, head, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Both halves, float32 [HEADS, BLOCK], of heads of one row."""
    column = tl.arange(0, BLOCK)
    mask = (head < COUNT)[:, None] & (column < HEAD_DIM // 2)[None, :]
    place = source + head[:, None] * HEAD_DIM + column[None, :]
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HEAD_DIM // 2, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _turn(
    first, second, token, positions, inv_freq, attention_factor, norm, eps, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr
):
    """The halves normed and turned, each where that is asked for."""
    column = tl.arange(0, BLOCK)
    mask = column < HEAD_DIM // 2
    if norm is not None:
        squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        first = first * scale * tl.load(norm + column, mask=mask, other=0.0).to(tl.float32)[None, :]
        second = second * scale * tl.load(norm + HEAD_DIM // 2 + column, mask=mask, other=0.0).to(tl.float32)[None, :]
    if inv_freq is not None:
        angle = tl.load(positions + token).to(tl.float32) * tl.load(inv_freq + column, mask=mask, other=0.0)
        cos_value, sin_value = cos_sin(angle)
        cos_value, sin_value = cos_value * attention_factor, sin_value * attention_factor
        first, second = rotate(first, second, cos_value[None, :], sin_value[None, :])
    return first, second


@triton.jit
def _write(
    target,
    first,
    second,
    head,
    stride_head,
    scale,
    COUNT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Into the slot at `target` of a cache, in the cache's type."""
    dtype: tl.constexpr = target.dtype.element_ty
    inverse = 1.0
    if scale is not None:
        inverse = (1.0 / tl.load(scale + head, mask=head < COUNT, other=1.0))[:, None]
    first, second = to_cache(first, inverse, dtype), to_cache(second, inverse, dtype)
    _store(target, head * stride_head, head, first, second, COUNT, HEAD_DIM, BLOCK)


@triton.jit
def _store(target, offset, head, first, second, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = (head < COUNT)[:, None] & (column < HEAD_DIM // 2)[None, :]
    place = target + offset[:, None] + column[None, :]
    tl.store(place, first, mask=mask)
    tl.store(place + HEAD_DIM // 2, second, mask=mask)
