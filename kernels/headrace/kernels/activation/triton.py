"""Element-wise non-linearities on the GPU, where they stand alone. Called by the GPU executor.

Most of them do not: gate and up projections end in the activation (`linear/triton.py`), scores are capped inside
attention. What is left are the final soft cap on logits and gated layers whose two matrices could not be joined.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from headrace.kernels.activation import triton_quantize
from headrace.kernels.activation.triton_math import act_and_multiply, tanh

_BLOCK = 2048


def gated_activation(
    gate: torch.Tensor,
    up: torch.Tensor,
    kind: Literal["silu", "gelu_tanh"],
    out: torch.Tensor,
    *,
    out_scale: torch.Tensor | None = None,
) -> None:
    """out = act(gate) * up, computed in float32. gate, up, out: [T, I] in float types; `out` may be one of the two.

    With out_scale: out is quantised row by row, or by 128 columns of a row, as `triton_quantize.quantize_rows` does it.
    """
    if (out.dtype in triton_quantize.QUANTIZED) != (out_scale is not None):
        raise ValueError(f"gated_activation: out_scale goes with a quantised out, out is {out.dtype}")
    if out_scale is not None:
        triton_quantize.launch(gate, up, kind, out, out_scale)
        return
    for tensor in (gate, up, out):
        if tensor.shape != out.shape or tensor.ndim != 2 or tensor.stride(1) != 1:
            raise ValueError(f"gated_activation: {tuple(tensor.shape)}, strides {tensor.stride()}, out {out.shape}")
    num_rows, width = out.shape
    if out.numel() == 0:
        return
    _gated_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
        gate,
        up,
        out,
        gate.stride(0),
        up.stride(0),
        out.stride(0),
        width,
        IS_SILU=kind == "silu",
        BLOCK=_BLOCK,
        num_warps=8,
    )


def soft_cap(x: torch.Tensor, cap: float) -> None:
    """x = cap * tanh(x / cap), in place. x: [T, N] in a float type."""
    if x.ndim != 2 or x.stride(1) != 1 or not cap > 0.0:
        raise ValueError(f"soft_cap: {tuple(x.shape)}, strides {x.stride()}, cap {cap}")
    if x.numel() == 0:
        return
    grid = (x.shape[0], triton.cdiv(x.shape[1], _BLOCK))
    _soft_cap_kernel[grid](x, cap, x.stride(0), x.shape[1], BLOCK=_BLOCK, num_warps=8)


@triton.jit
def _gated_kernel(gate, up, out, stride_gate, stride_up, stride_out, width, IS_SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    x = tl.load(gate + row * stride_gate + column, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(up + row * stride_up + column, mask=mask, other=0.0).to(tl.float32)
    value = act_and_multiply(x, y, IS_SILU)
    tl.store(out + row * stride_out + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _soft_cap_kernel(x, cap, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = x + row * stride + column
    value = tl.load(place, mask=column < width, other=0.0).to(tl.float32)
    tl.store(place, (cap * tanh(value / cap)).to(x.dtype.element_ty), mask=column < width)
