"""Activations in 8 bits, each row with a scale of its own: rows as they are, or act(gate) * up of two.

What a product of int8 or fp8 reads where no norm (`rms_norm/triton.py`) has made it. A launch of its own, because a
scale needs the whole row and the product before it has a row in many programs: the last of them to arrive would
quantise alone what 100 programs can share. Called by the GPU executor and by `triton.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from headrace.kernels.activation.triton_math import act_and_multiply
from headrace.kernels.triton_convert import convert, scale_for

QUANTIZED = (torch.int8, torch.uint8, torch.float8_e4m3fn)
SCALE_GROUP = 128  # columns per scale where a row has several: those of fp8_block (`linear/quantize.py`)
_ROW_BLOCK = 4096  # columns that a program holds at once
_GROUPS_BLOCK = 2048


def quantize_rows(x: torch.Tensor, out: torch.Tensor, out_scale: torch.Tensor) -> None:
    """out * out_scale = x, as near as the type allows.

    x: [M, K] in a float type. out: [M, K] int8, float8_e4m3fn or uint8 (its bits). out_scale: float32 [M], or
    [M, ceil(K / 128)]: one for each 128 columns. A row (or its 128 columns) with NaN or infinity has a scale of NaN.
    """
    launch(x, None, None, out, out_scale)


def launch(
    x: torch.Tensor, up: torch.Tensor | None, kind: str | None, out: torch.Tensor, out_scale: torch.Tensor
) -> None:
    """As `quantize_rows`, of act(x) * up where `up` is given; kind: "silu" or "gelu_tanh"."""
    num_rows, width = out.shape
    has_groups = out_scale.ndim == 2
    want = (num_rows, -(-width // SCALE_GROUP)) if has_groups else (num_rows,)
    for tensor in (x, out) if up is None else (x, up, out):
        if tensor.shape != out.shape or tensor.ndim != 2 or tensor.stride(1) != 1:
            raise ValueError(f"quantize_rows: {tuple(tensor.shape)}, strides {tensor.stride()}, out {out.shape}")
    if out.dtype not in QUANTIZED or out_scale.dtype != torch.float32 or out_scale.shape != want:
        raise ValueError(
            f"quantize_rows: out {out.dtype} with scales {tuple(out_scale.shape)} {out_scale.dtype}: want an 8-bit "
            f"type and float32 {list(want)}"
        )
    if has_groups and out_scale.stride(1) != 1:
        raise ValueError(f"quantize_rows: scales must be dense along a row, have strides {out_scale.stride()}")
    if out.numel() == 0:
        return
    kernel = _groups_kernel if has_groups else _rows_kernel
    block = _GROUPS_BLOCK if has_groups else min(_ROW_BLOCK, max(128, triton.next_power_of_2(width)))
    kernel[(num_rows, triton.cdiv(width, block) if has_groups else 1)](
        x,
        up,
        out,
        out_scale,
        x.stride(0),
        0 if up is None else up.stride(0),
        out.stride(0),
        out_scale.stride(0),
        width,
        IS_SILU=kind == "silu",
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )


@triton.jit
def _rows_kernel(
    x, up, out, out_scale, stride_x, stride_up, stride_out, stride_scale, width,
    IS_SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: its largest magnitude, then its values, which the second time come from the L1 cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x += row * stride_x
    if up is not None:
        up += row * stride_up
    largest = tl.zeros([BLOCK], tl.float32)
    poison = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, width, BLOCK):
        value = _values(x, up, begin + column, width, IS_SILU)
        largest = tl.maximum(largest, tl.abs(value))
        poison += value * 0.0  # NaN where a value is not finite: maxima and integers would not tell
    scale = scale_for(tl.max(largest, axis=0), out.dtype.element_ty)
    tl.store(out_scale + row * stride_scale, scale + tl.sum(poison, axis=0))
    for begin in tl.range(0, width, BLOCK):
        value = _values(x, up, begin + column, width, IS_SILU)
        place = out + row * stride_out + begin + column
        tl.store(place, convert(value / scale, out.dtype.element_ty), mask=begin + column < width)


@triton.jit
def _groups_kernel(
    x, up, out, out_scale, stride_x, stride_up, stride_out, stride_scale, width,
    IS_SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of a row, a scale for each 128."""
    GROUPS: tl.constexpr = BLOCK // 128
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if up is not None:
        up += row * stride_up
    value = tl.reshape(_values(x + row * stride_x, up, column, width, IS_SILU), (GROUPS, 128))
    scale = scale_for(tl.max(tl.abs(value), axis=1), out.dtype.element_ty)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    poison = tl.sum(value * 0.0, axis=1)
    tl.store(out_scale + row * stride_scale + group, scale + poison, mask=group * 128 < width)
    value = tl.reshape(value / scale[:, None], (BLOCK,))
    tl.store(out + row * stride_out + column, convert(value, out.dtype.element_ty), mask=column < width)


@triton.jit
def _values(x, up, column, width, IS_SILU: tl.constexpr):
    """float32: columns of a row, 0 behind its end."""
    value = tl.load(x + column, mask=column < width, other=0.0).to(tl.float32)
    if up is not None:
        value = act_and_multiply(value, tl.load(up + column, mask=column < width, other=0.0).to(tl.float32), IS_SILU)
    return value
