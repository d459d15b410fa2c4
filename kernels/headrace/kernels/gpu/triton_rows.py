# mypy: ignore-errors
"""Rows added and rows gathered, where no product does it: torch's own ops would be the only ones left in a step.

Called by `step.py`: `add` after Gemma's norms, `select` for the rows of a prefill step whose logits are wanted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a + b, in float32. a, b, out: [T, N] in float types, rows of any stride; `out` may be one of the two."""
    for tensor in (a, b, out):
        if tensor.shape != out.shape or tensor.ndim != 2 or tensor.stride(1) != 1:
            raise ValueError(f"add: {tuple(tensor.shape)}, strides {tensor.stride()}, beside {tuple(out.shape)}")
    if out.numel():
        grid = out.shape[0], triton.cdiv(out.shape[1], _BLOCK)
        strides = a.stride(0), b.stride(0), out.stride(0)
        _add_kernel[grid](a, b, out, *strides, out.shape[1], BLOCK=_BLOCK, num_warps=4)


def select(x: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """out[i] = x[rows[i]]. x: [T, N]; rows: int32 [S], each below T; out: [S, N] of x's type, not in x's memory."""
    if out.ndim != 2 or x.ndim != 2 or out.shape != (rows.shape[0], x.shape[1]) or out.dtype != x.dtype:
        raise ValueError(f"select: {tuple(x.shape)} {x.dtype}, {tuple(rows.shape)} rows, out {tuple(out.shape)}")
    if rows.dtype != torch.int32 or not rows.is_contiguous() or x.stride(1) != 1 or out.stride(1) != 1:
        raise ValueError(f"select: rows {rows.dtype}, strides {x.stride()} and {out.stride()}: want int32, rows dense")
    if out.numel():
        grid = out.shape[0], triton.cdiv(out.shape[1], _BLOCK)
        _select_kernel[grid](x, rows, out, x.stride(0), out.stride(0), out.shape[1], BLOCK=_BLOCK, num_warps=4)


@triton.jit
def _add_kernel(a, b, out, stride_a, stride_b, stride_out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(a + row * stride_a + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(b + row * stride_b + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * stride_out + column, (x + y).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _select_kernel(x, rows, out, stride_x, stride_out, width, BLOCK: tl.constexpr):
    source = tl.load(rows + tl.program_id(0)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(x + source * stride_x + column, mask=mask)
    tl.store(out + tl.program_id(0).to(tl.int64) * stride_out + column, value, mask=mask)
