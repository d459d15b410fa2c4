"""RMSNorm on the GPU: rows or heads, with the residual added first and the output quantised where asked for.

Called by the GPU executor where the rows are to be in 8 bits, and where no product takes the norm in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from headrace.kernels.triton_convert import convert, scale_for

QUANTIZED = (torch.int8, torch.uint8, torch.float8_e4m3fn)
MAX_GROUP = 16384  # one program holds a whole group in registers
SCALE_GROUP = 128  # columns per scale where a row has several: those of fp8_block (`linear/quantize.py`)


@dataclass(frozen=True)
class RmsNormConfig:
    """rows: groups per program, a power of two. num_warps: warps per program."""

    rows: int
    num_warps: int


def default_config(group: int) -> RmsNormConfig:
    """A whole group per program, 8 elements a thread of at most 16 warps, else 32: a function of the width alone.

    16 elements a thread would do with fewer warps, but ptxas then stops at 40 registers on sm_80, and spills.
    """
    block = triton.next_power_of_2(group)
    rows = max(1, 1024 // block)
    warps = max(1, rows * block // 256)
    return RmsNormConfig(rows, warps if warps <= 16 else warps // 4)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    group: int | None = None,
    out_scale: torch.Tensor | None = None,
    config: RmsNormConfig | None = None,
) -> None:
    """out = y / sqrt(mean(y^2) + eps) * weight over each group of columns; y = x, or x + residual, rounded and
    written back to residual.

    x, residual: [T, N * G] float16, bfloat16 or float32, rows of any stride. weight: [G]. out: [T, N * G] in a float
    type (`x` itself is allowed), or with N = 1 in int8, float8_e4m3fn or uint8 (its bits) with out_scale float32 [T]
    (one scale per row) or [T, ceil(G / 128)] (one per 128 columns), out * out_scale being the value. A row with NaN or
    infinity gets scales of NaN.
    """
    group = weight.shape[0] if group is None else group
    _check(x, weight, out, residual, group, out_scale)
    num_tokens, width = x.shape
    groups_per_row = width // group
    if num_tokens == 0:
        return
    config = default_config(group) if config is None else config
    has_groups = out_scale is not None and out_scale.ndim == 2
    block = max(SCALE_GROUP if has_groups else 1, triton.next_power_of_2(group))
    grid = (triton.cdiv(num_tokens * groups_per_row, config.rows),)
    _rms_norm_kernel[grid](
        x,
        residual,
        weight,
        out,
        out_scale,
        num_tokens * groups_per_row,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        0 if out_scale is None else out_scale.stride(0),
        eps,
        GROUP=group,
        GROUPS_PER_ROW=groups_per_row,
        ROWS=config.rows,
        BLOCK=block,
        SCALE_BLOCK=SCALE_GROUP if has_groups else block,
        num_warps=config.num_warps,
    )


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None,
    group: int,
    out_scale: torch.Tensor | None,
) -> None:
    if x.ndim != 2 or weight.shape != (group,) or x.shape[1] % group or group > MAX_GROUP:
        raise ValueError(f"rms_norm: x {tuple(x.shape)} in groups of {group}, weight {tuple(weight.shape)}")
    for name, tensor in (("out", out), ("residual", residual)):
        if tensor is not None and (tensor.shape != x.shape or tensor.stride(1) != 1):
            raise ValueError(f"rms_norm: {name} {tuple(tensor.shape)}, strides {tensor.stride()}: want x's shape")
    if x.stride(1) != 1:
        raise ValueError(f"rms_norm: x must be dense along a row, has strides {x.stride()}")
    if (out.dtype in QUANTIZED) != (out_scale is not None):
        raise ValueError(f"rms_norm: out_scale goes with a quantised out, out is {out.dtype}")
    if out_scale is not None:
        want = (x.shape[0], -(-group // SCALE_GROUP))
        if out_scale.shape not in (want, want[:1]) or out_scale.dtype != torch.float32 or out_scale.stride(-1) != 1:
            raise ValueError(
                f"rms_norm: out_scale {tuple(out_scale.shape)} {out_scale.dtype}: want float32 [{want[0]}] or "
                f"{list(want)}, dense along a row"
            )
    if out_scale is not None and x.shape[1] != group:
        raise ValueError("rms_norm: only whole rows are quantised, not heads")


@triton.jit
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    out_scale,
    num_rows,
    stride_x,
    stride_residual,
    stride_out,
    stride_scale,
    eps,
    GROUP: tl.constexpr,
    GROUPS_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    token = (row // GROUPS_PER_ROW).to(tl.int64)
    inside = (row % GROUPS_PER_ROW * GROUP)[:, None] + column[None, :]
    mask = (row < num_rows)[:, None] & (column < GROUP)[None, :]
    y = tl.load(x + token[:, None] * stride_x + inside, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        place = residual + token[:, None] * stride_residual + inside
        y += tl.load(place, mask=mask, other=0.0).to(tl.float32)
        # The norm sees what later layers will read, so a fused path and this one agree.
        stored = y.to(residual.dtype.element_ty)
        tl.store(place, stored, mask=mask)
        y = stored.to(tl.float32)
    sum_of_squares = tl.sum(y * y, axis=1)
    w = tl.load(weight + column, mask=column < GROUP, other=0.0).to(tl.float32)
    y = y * tl.rsqrt(sum_of_squares / GROUP + eps)[:, None] * w[None, :]
    if out_scale is not None:
        # Times zero: NaN where the sum is not finite. Integers could not tell.
        poison = sum_of_squares * 0.0
        if SCALE_BLOCK == BLOCK:
            scale = scale_for(tl.max(tl.abs(y), axis=1), out.dtype.element_ty)
            y = y / scale[:, None]
            tl.store(out_scale + row * stride_scale, scale + poison, mask=row < num_rows)
        else:
            COUNT: tl.constexpr = BLOCK // SCALE_BLOCK
            parts = tl.reshape(y, (ROWS, COUNT, SCALE_BLOCK))
            scale = scale_for(tl.max(tl.abs(parts), axis=2), out.dtype.element_ty)
            y = tl.reshape(parts / scale[:, :, None], (ROWS, BLOCK))
            part = tl.arange(0, COUNT)
            inside_row = (row < num_rows)[:, None] & (part * SCALE_BLOCK < GROUP)[None, :]
            place = out_scale + (row * stride_scale)[:, None] + part[None, :]
            tl.store(place, scale + poison[:, None], mask=inside_row)
    place = out + token[:, None] * stride_out + inside
    tl.store(place, convert(y, out.dtype.element_ty), mask=mask)
