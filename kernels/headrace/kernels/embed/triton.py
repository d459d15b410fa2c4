"""Embedding lookup on the GPU, from dense and from packed tables. Called by the GPU executor at the start of a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from headrace.kernels.linear import PackedLinear
from headrace.kernels.linear.layout import PLANES, TILE

_BLOCK = 1024  # columns per program


def embed(token_ids: torch.Tensor, table: torch.Tensor | PackedLinear, scale: float, out: torch.Tensor) -> None:
    """out[t] = table[token_ids[t]] * scale.

    token_ids: int32 [T]. table: [V, D] float16, bfloat16 or float32 with dense rows, or packed in any kind but
    fp8_block, not gated. out: [T, D] in a float type. The arithmetic is float32. A row whose id is outside 0..V-1
    becomes NaN: the check of its logits then marks it.
    """
    num_tokens, width = out.shape
    if token_ids.shape != (num_tokens,) or token_ids.dtype != torch.int32 or table.shape[1] != width:
        raise ValueError(
            f"embed: token_ids {tuple(token_ids.shape)} {token_ids.dtype}, table {tuple(table.shape)}, "
            f"out {tuple(out.shape)} do not go together"
        )
    if out.stride(1) != 1 or (isinstance(table, torch.Tensor) and table.stride(1) != 1):
        raise ValueError("embed: rows of table and out must be dense")
    if isinstance(table, PackedLinear) and (table.is_gated or table.kind == "fp8_block"):
        raise ValueError(f"embed: no lookup in a {'gated' if table.is_gated else table.kind} matrix")
    if num_tokens == 0:
        return
    if isinstance(table, PackedLinear) and table.kind in PLANES:
        _embed_packed(token_ids, table, scale, out)
    elif isinstance(table, PackedLinear):
        _embed_rows(token_ids, table.tensors["weight"], table.tensors.get("scales"), scale, out)
    else:
        _embed_rows(token_ids, table, None, scale, out)


def _embed_rows(
    token_ids: torch.Tensor, table: torch.Tensor, row_scales: torch.Tensor | None, scale: float, out: torch.Tensor
) -> None:
    num_tokens, width = out.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _rows_kernel[(num_tokens, triton.cdiv(width, block))](
        token_ids,
        table,
        row_scales,
        out,
        scale,
        table.shape[0],
        table.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )


def _embed_packed(token_ids: torch.Tensor, table: PackedLinear, scale: float, out: torch.Tensor) -> None:
    layout, words, scales = table.blocks, table.tensors["words"], table.tensors["scales"]
    is_half = scales.dtype != torch.float32
    zeros = table.tensors.get("zeros")
    num_blocks = words.shape[1]
    step = min(_BLOCK // layout.block_k, triton.next_power_of_2(num_blocks))
    _packed_kernel[(out.shape[0], triton.cdiv(num_blocks, step))](
        token_ids,
        words,
        scales.view(torch.float16) if is_half else scales,
        None if zeros is None else zeros.view(torch.float16) if is_half else zeros,
        out,
        scale,
        table.shape[0],
        out.stride(0),
        WIDTH=out.shape[1],
        NUM_BLOCKS=num_blocks,
        PLANES=layout.planes,
        WORDS=layout.words,
        GROUPS=layout.groups,
        TILE=TILE,
        IS_HALF=is_half,
        STEP=step,
        num_warps=max(1, step * layout.words // 256),
    )


@triton.jit
def _rows_kernel(
    token_ids,
    table,
    row_scales,
    out,
    scale,
    num_rows,
    stride_table,
    stride_out,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    token_id = tl.load(token_ids + token)
    is_known = (token_id >= 0) & (token_id < num_rows)
    row = table + token_id.to(tl.int64) * stride_table
    value = tl.load(row + column, mask=inside & is_known, other=0.0).to(tl.float32) * scale
    if row_scales is not None:
        value *= tl.load(row_scales + token_id, mask=is_known, other=0.0)
    value = tl.where(is_known, value, float("nan"))
    tl.store(out + token.to(tl.int64) * stride_out + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _packed_kernel(
    token_ids,
    words,
    scales,
    zeros,
    out,
    scale,
    num_rows,
    stride_out,
    WIDTH: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    PLANES: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    TILE: tl.constexpr,
    IS_HALF: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (token, step): STEP blocks of a row, a plane of their words at a time (`linear/layout.py`)."""
    BITS: tl.constexpr = 16 // PLANES
    PER_GROUP: tl.constexpr = PLANES * WORDS // GROUPS
    token = tl.program_id(0)
    token_id = tl.load(token_ids + token)
    is_known = (token_id >= 0) & (token_id < num_rows)
    tile, row = (token_id // TILE).to(tl.int64), token_id % TILE
    block = tl.program_id(1) * STEP + tl.arange(0, STEP)
    word = tl.arange(0, WORDS)
    mask = (block < NUM_BLOCKS)[:, None] & is_known
    place = (tile * NUM_BLOCKS + block) * TILE + row
    packed = tl.load(words + place[:, None] * WORDS + word[None, :], mask=mask, other=0).to(tl.int32)
    for plane in tl.static_range(PLANES):
        q = ((packed >> (plane * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        in_block = plane * WORDS + word
        group = plane * WORDS // PER_GROUP  # a plane never crosses the border of a group
        if IS_HALF:
            where = place * GROUPS + group
        else:
            where = ((tile * NUM_BLOCKS + block) * GROUPS + group) * TILE + row
        factor = tl.load(scales + where, mask=(block < NUM_BLOCKS) & is_known, other=0.0).to(tl.float32)[:, None]
        if BITS == 8:  # stored with 128 added
            value = factor * (q - 128.0)
        else:
            value = factor * q
        if zeros is not None:
            zero = tl.load(zeros + where, mask=(block < NUM_BLOCKS) & is_known, other=0.0).to(tl.float32)
            value += zero[:, None]
        elif BITS == 4:
            value -= factor * 8.0
        value = tl.where(is_known, value * scale, float("nan"))
        column = block[:, None] * (PLANES * WORDS) + in_block[None, :]
        target = out + token.to(tl.int64) * stride_out + column
        tl.store(target, value.to(out.dtype.element_ty), mask=column < WIDTH)
