"""Embedding lookup on the GPU. Called by the GPU executor at the start of a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """out[t] = table[token_ids[t]] * scale.

    token_ids: int32 [T]. table: [V, D] float16, bfloat16 or float32. out: [T, D], any of these. The product is
    float32. A row whose id is outside 0..V-1 becomes NaN: the check of its logits then marks it.
    """
    num_tokens, width = out.shape
    if token_ids.shape != (num_tokens,) or token_ids.dtype != torch.int32 or table.shape[1] != width:
        raise ValueError(
            f"embed: token_ids {tuple(token_ids.shape)} {token_ids.dtype}, table {tuple(table.shape)}, "
            f"out {tuple(out.shape)} do not go together"
        )
    if table.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError("embed: rows of table and out must be dense")
    if num_tokens == 0:
        return
    block = min(_BLOCK, triton.next_power_of_2(width))
    _embed_kernel[(num_tokens, triton.cdiv(width, block))](
        token_ids,
        table,
        out,
        scale,
        table.shape[0],
        table.stride(0),
        out.stride(0),
        WIDTH=width,
        BLOCK=block,
        num_warps=max(1, block // 256),
    )


@triton.jit
def _embed_kernel(
    token_ids, table, out, scale, num_rows, stride_table, stride_out, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    token_id = tl.load(token_ids + token)
    is_known = (token_id >= 0) & (token_id < num_rows)
    row = table + token_id.to(tl.int64) * stride_table
    value = tl.load(row + column, mask=mask & is_known, other=float("nan")).to(tl.float32) * scale
    tl.store(out + token.to(tl.int64) * stride_out + column, value.to(out.dtype.element_ty), mask=mask)
