"""The product on the GPU: one launch for norm, product, bias, activation and residual. Called by the GPU executor.

A row's result depends on the row and the weight alone: not on the other rows, their number, or the block sizes. For
many rows a norm that the product before has not prepared is a launch of its own, with the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from headrace.kernels.activation.triton_quantize import quantize_rows
from headrace.kernels.linear import triton_persistent as persistent
from headrace.kernels.linear.check import QUANTIZED, check_product
from headrace.kernels.linear.config import LinearConfig, default_config, for_heads
from headrace.kernels.linear.epilogue import NextNorm, RopeKvEpilogue, check_squares
from headrace.kernels.linear.layout import PLANES, SQUARES_COLUMNS
from headrace.kernels.linear.pack import PackedLinear
from headrace.kernels.linear.triton_arguments import flags_of, row_scale_of, tail_of
from headrace.kernels.linear.triton_direct import direct_kernel
from headrace.kernels.linear.triton_norm import norm_rows_kernel
from headrace.kernels.linear.triton_packed import packed_kernel

__all__ = ["QUANTIZED", "linear"]

# The workspace opens with one int32 counter per tile, zero between launches; sums of chunks or normed rows follow.
MAX_SPLIT_TILES = 4096
COUNTER_BYTES = 4 * MAX_SPLIT_TILES

# Rows up to which the norm is a prologue: every program norms its rows anew, which many rows make dear.
PROLOGUE_ROWS = 32
NORM_ROWS = 16  # per program of that launch

# Rows up to which a product quantises its output by 128 columns: tiles so wide leave no registers for more.
QUANTIZED_ROWS = 32


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: tiles of the weight and of x, chunks of K, and whether these are programs of their own."""

    n: int
    m: int
    splits: int
    is_split: bool

    @property
    def programs(self) -> int:
        return self.n * self.m * (self.splits if self.is_split else 1)


@dataclass(frozen=True)
class Operands:
    """The tensors of one launch."""

    x: torch.Tensor
    out: torch.Tensor
    norm_weight: torch.Tensor | None
    eps: float
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    x_scale: torch.Tensor | None
    partials: torch.Tensor | None
    counters: torch.Tensor | None
    activation: str | None
    rope_kv: RopeKvEpilogue | None
    squares: tuple[torch.Tensor, float] | None
    next_norm: NextNorm | None
    out_scale: torch.Tensor | None


def cut(weight: PackedLinear, m: int, config: LinearConfig) -> Tiles:
    """The tiles of a product of m rows."""
    tiles_n, tiles_m = -(-weight.packed_rows // config.block_n), -(-m // config.block_m)
    splits = weight.num_splits
    is_split = splits > 1 and tiles_n * tiles_m < min(config.split_programs, MAX_SPLIT_TILES)
    return Tiles(tiles_n, tiles_m, splits, is_split)


def default_for(weight: PackedLinear, m: int) -> LinearConfig:
    """The configuration of a product of m rows that nobody tuned."""
    has_zeros, groups, splits = "zeros" in weight.tensors, weight.blocks.groups, weight.num_splits
    return default_config(weight.kind, m, groups=groups, has_zeros=has_zeros, splits=splits, arch=_arch())


def workspace_bytes(
    weight: PackedLinear,
    m: int,
    config: LinearConfig | None = None,
    *,
    has_norm: bool = True,
    has_out_scale: bool = False,
) -> int:
    """Bytes of workspace that a product of m rows needs; products on one stream share a workspace."""
    config = default_for(weight, m) if config is None else config
    for_all = [config, *(for_heads(config, weight.kind, head_dim) for head_dim in (16, 32, 64, 128, 256))]
    for_all.append(for_out_scale(config, weight))
    sums = max(_sums_bytes(weight, m, each) for each in for_all)
    sums += _wide_bytes(weight, m) if has_out_scale else 0
    sums += persistent.group_sums_bytes(weight, m, config)
    return COUNTER_BYTES + sums + (sum(_normed_bytes(weight, m)) if has_norm and m > PROLOGUE_ROWS else 0)


def for_out_scale(config: LinearConfig, weight: PackedLinear) -> LinearConfig:
    """`config` where a tile must hold 128 columns of the output, or 128 of gate and of up."""
    block_n = 256 if weight.is_gated else 128
    stages = min(config.num_stages, 3)
    return replace(config, block_n=block_n, block_m=min(config.block_m, 32), num_warps=8, num_stages=stages)


def _wide_bytes(weight: PackedLinear, m: int) -> int:
    """Bytes of m rows of the output before they are quantised, kept to 16 bytes."""
    return -(-m * weight.out_features * weight.dtype.itemsize // 16) * 16


def _sums_bytes(weight: PackedLinear, m: int, config: LinearConfig) -> int:
    """Bytes of the sums of chunks."""
    tiles = cut(weight, m, config)
    return 4 * tiles.programs * (config.block_n + 1) * config.block_m if tiles.is_split else 0


def linear(
    x: torch.Tensor,
    weight: PackedLinear,
    out: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    rope_kv: RopeKvEpilogue | None = None,
    x_scale: torch.Tensor | None = None,
    squares: tuple[torch.Tensor, float] | None = None,
    next_norm: NextNorm | None = None,
    out_scale: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> None:
    """out = act(norm(x) @ weight.T + bias) + residual.

    x: [M, K] of weight.dtype, dense rows of any stride; or what the weight's kind multiplies (int8 for w8a8, which
    takes nothing else; float8_e4m3fn for fp8 and fp8_block) with x_scale float32 [M] (fp8_block: [M, ceil(K / 128)]),
    x * x_scale being the values. out: [M, weight.out_features], rows of any stride, of a float type.
    norm: (weight [K], eps): x / sqrt(mean(x^2) + eps) * weight first. weight and x * weight are rounded to x's type
    (where they must be finite), what is divided is not. bias: [weight.shape[0]] in the order of the sources.
    residual: as out, which it may be. activation: "silu" or "gelu_tanh" exactly when the weight is gated:
    act(gate) * up. rope_kv: instead of residual and activation; `out` then gets q, its other columns are not written.
    squares: (those of a NextNorm, eps): x is what it calls `normed`, instead of norm. next_norm: prepare the norm of
    out; not with an activation or rope_kv. out_scale, float32: out is int8 or float8_e4m3fn; its values, rounded to
    weight.dtype, are quantised by 128 columns of a row ([M, ceil(out_features / 128)]), in the product itself up to 32
    rows, or by rows ([M]), always in a launch of its own, for which `workspace` holds the values: a row lies in many
    programs. Not with residual, rope_kv or next_norm.
    workspace: uint8, `workspace_bytes`, 16-byte aligned, zero before its first use; None where none is needed.
    """
    m = x.shape[0]
    config = default_for(weight, m) if config is None else config
    check_product(x, weight, out, norm, bias, residual, x_scale, activation, out_scale)
    if rope_kv is not None:
        rope_kv.check(m, weight.shape[0])
        if residual is not None or activation is not None:
            raise ValueError("linear: rope_kv leaves no room for a residual or an activation")
        has_head_norm = rope_kv.q_norm is not None
        config = for_heads(config, weight.kind, rope_kv.head_dim, has_head_norm=has_head_norm, arch=_arch())
    if squares is not None:
        if norm is not None or x_scale is not None or weight.kind == "fp8_block":
            raise ValueError("linear: squares stand in for a norm, of x that is not quantised, and not with fp8_block")
        check_squares("squares", squares[0], m, x.shape[1])
    if next_norm is not None:
        if activation is not None or rope_kv is not None:
            raise ValueError("linear: next_norm is of a product without activation and rope_kv")
        next_norm.check(out)
        config = replace(config, block_n=max(config.block_n, SQUARES_COLUMNS))
    if out_scale is not None:
        if residual is not None or rope_kv is not None or next_norm is not None:
            raise ValueError("linear: out_scale leaves no room for residual, rope_kv or next_norm")
        if m > 0 and (out_scale.ndim == 1 or m > QUANTIZED_ROWS):
            size = _wide_bytes(weight, m)
            begin = 0 if workspace is None else workspace.numel() // 16 * 16 - size
            if workspace is None or begin < COUNTER_BYTES:
                raise ValueError(f"linear: out_scale needs a workspace of {COUNTER_BYTES + size} bytes (uint8)")
            wide = workspace[begin : begin + size].view(weight.dtype)[: m * weight.out_features].view(out.shape)
            given = partial(linear, norm=norm, bias=bias, activation=activation, x_scale=x_scale, squares=squares)
            given(x, weight, wide, workspace=workspace[:begin], config=config)
            quantize_rows(wide, out, out_scale)
            return
        config = for_out_scale(config, weight)
    if m == 0:
        return
    tiles = cut(weight, m, config)
    sums = _sums_bytes(weight, m, config)
    is_persistent = config.programs_per_sm > 0 and not tiles.is_split and (norm is None or m > PROLOGUE_ROWS)
    group_sums = persistent.group_sums_bytes(weight, m, config) if is_persistent else 0
    need = COUNTER_BYTES + sums + group_sums
    if norm is not None and m > PROLOGUE_ROWS:
        need += sum(_normed_bytes(weight, m))
    if need > COUNTER_BYTES and (workspace is None or workspace.dtype != torch.uint8 or workspace.numel() < need):
        raise ValueError(f"linear: needs a workspace of {need} bytes (uint8)")
    partials = counters = None
    if workspace is not None and tiles.is_split:
        counters = workspace[:COUNTER_BYTES].view(torch.int32)
        partials = workspace[COUNTER_BYTES : COUNTER_BYTES + sums].view(torch.float32)
    norm_weight, eps = (None, 0.0) if norm is None else norm
    if workspace is not None and norm_weight is not None and m > PROLOGUE_ROWS:
        x, x_scale = _norm_rows(x, weight, norm_weight, eps, tiles, workspace[: need - group_sums])
        norm_weight = None
    operands = Operands(
        x, out, norm_weight, eps, bias, residual, x_scale, partials, counters, activation, rope_kv, squares, next_norm,
        out_scale,
    )  # fmt: skip
    if weight.kind in PLANES:
        area = workspace[need - group_sums : need] if workspace is not None and group_sums else None
        _launch_packed(operands, weight, tiles, config, is_persistent, area)
    else:
        _launch_direct(operands, weight, tiles, config, is_persistent)


def _normed_bytes(weight: PackedLinear, m: int) -> tuple[int, int]:
    """Bytes of m normed rows and of their factors."""
    return -(-m * weight.shape[1] * weight.dtype.itemsize // 16) * 16, 4 * -(-m // 4) * 4


def _norm_rows(
    x: torch.Tensor, weight: PackedLinear, norm_weight: torch.Tensor, eps: float, tiles: Tiles, workspace: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x * norm_weight, its rows' factors), at the end of the workspace."""
    m, k = x.shape
    layout = weight.blocks
    row_bytes, factor_bytes = _normed_bytes(weight, m)
    start = workspace.numel() - row_bytes - factor_bytes
    normed = workspace[start : start + row_bytes].view(weight.dtype)[: m * k].view(m, k)
    factors = workspace[start + row_bytes :].view(torch.float32)[:m]
    num_blocks = -(-k // layout.block_k)
    norm_rows_kernel[(-(-m // NORM_ROWS),)](
        x,
        norm_weight,
        normed,
        factors,
        m,
        k,
        num_blocks * layout.planes,
        -(-num_blocks // tiles.splits) * layout.planes,
        x.stride(0),
        eps,
        ROWS=NORM_ROWS,
        WIDTH=layout.words,
        EVEN_K=k % layout.block_k == 0,
        num_warps=1,
        num_stages=6,
    )
    return normed, factors


def _launch_packed(
    operands: Operands,
    weight: PackedLinear,
    tiles: Tiles,
    config: LinearConfig,
    is_persistent: bool,
    group_sums: torch.Tensor | None,
) -> None:
    layout = weight.blocks
    x, out, residual, heads = operands.x, operands.out, operands.residual, tail_of(operands)
    constants = {
        "PLANES": layout.planes,
        "GROUPS": layout.groups,
        "INLINE_ASM": weight.dtype != torch.float32 and _has_ptx(),
        **_common(operands, weight, tiles, config),
    }
    if is_persistent:
        persistent.launch_packed(operands, weight, heads, tiles, config, constants, group_sums)
        return
    packed_kernel[(tiles.programs,)](
        x,
        weight.tensors["words"],
        weight.tensors["scales"],
        weight.tensors.get("zeros"),
        out,
        operands.norm_weight,
        operands.bias,
        residual,
        heads,
        row_scale_of(operands),
        operands.partials,
        operands.counters,
        x.shape[0],
        weight.packed_rows,
        weight.out_features,
        weight.shape[1],
        -(-weight.shape[1] // layout.block_k),
        tiles.n,
        tiles.m,
        x.stride(0),
        out.stride(0),
        0 if residual is None else residual.stride(0),
        operands.eps,
        **constants,
    )


def _launch_direct(
    operands: Operands, weight: PackedLinear, tiles: Tiles, config: LinearConfig, is_persistent: bool
) -> None:
    block_k = weight.blocks.block_k
    x, out, residual, x_scale = operands.x, operands.out, operands.residual, operands.x_scale
    heads, row_scale = tail_of(operands), row_scale_of(operands)
    values, scales = weight.tensors["weight"], weight.tensors.get("scales")
    if values.dtype == torch.float8_e4m3fn and x.dtype != torch.float8_e4m3fn:
        values = values.view(torch.uint8)
    constants = {
        "IS_BLOCK_SCALED": weight.kind == "fp8_block",
        "EVEN_N": weight.packed_rows % config.block_n == 0,
        **_common(operands, weight, tiles, config),
    }
    if is_persistent:
        persistent.launch_direct(operands, weight, values, heads, tiles, config, constants)
        return
    direct_kernel[(tiles.programs,)](
        x,
        values,
        out,
        operands.norm_weight,
        operands.bias,
        residual,
        heads,
        row_scale,
        scales,
        operands.partials,
        operands.counters,
        x.shape[0],
        weight.packed_rows,
        weight.out_features,
        weight.shape[1],
        -(-weight.shape[1] // block_k),
        tiles.n,
        tiles.m,
        x.stride(0),
        values.stride(0),
        out.stride(0),
        0 if residual is None else residual.stride(0),
        0 if x_scale is None else x_scale.stride(0),
        x_scale.stride(1) if x_scale is not None and x_scale.ndim == 2 else 0,
        0 if scales is None else scales.stride(0),
        operands.eps,
        **constants,
    )


def _common(operands: Operands, weight: PackedLinear, tiles: Tiles, config: LinearConfig) -> dict[str, Any]:
    """The constants and launch parameters that both kernels take."""
    block_k = weight.blocks.block_k
    rope_kv = operands.rope_kv
    return {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": block_k,
        "SPLITS": tiles.splits,
        "SPLIT_GRID": tiles.is_split,
        "GROUP_N": config.group_n,
        "EVEN_K": weight.shape[1] % block_k == 0,
        "ACTIVATION": operands.activation,
        "HEAD_FLAGS": flags_of(operands, weight.dtype),
        "HEAD_BLOCK_SIZE": 1 if rope_kv is None else rope_kv.k_cache.shape[2],
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _has_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU; the interpreter has no target, and runs the plain forms."""
    return _arch().startswith("sm_")


def _arch() -> str:
    """ "sm_90", "gfx942"; "" in the interpreter."""
    if triton.knobs.runtime.interpret:
        return ""
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)
