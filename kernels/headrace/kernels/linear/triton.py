"""The product on the GPU: one launch for norm, product, bias, activation and residual. Called by the GPU executor.

A row's result depends on the row and the weight alone: not on the other rows, their number, or the block sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from headrace.kernels.linear.config import LinearConfig, default_config
from headrace.kernels.linear.layout import PLANES
from headrace.kernels.linear.pack import PackedLinear
from headrace.kernels.linear.triton_direct import direct_kernel
from headrace.kernels.linear.triton_packed import packed_kernel

QUANTIZED = {"w8a8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_block": torch.float8_e4m3fn}
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# The workspace opens with one int32 counter per tile, zero between launches; the chunks' sums follow.
MAX_SPLIT_TILES = 4096
COUNTER_BYTES = 4 * MAX_SPLIT_TILES


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


def cut(weight: PackedLinear, m: int, config: LinearConfig) -> Tiles:
    """The tiles of a product of m rows."""
    tiles_n, tiles_m = -(-weight.packed_rows // config.block_n), -(-m // config.block_m)
    splits = weight.num_splits
    is_split = splits > 1 and tiles_n * tiles_m < min(config.split_programs, MAX_SPLIT_TILES)
    return Tiles(tiles_n, tiles_m, splits, is_split)


def workspace_bytes(weight: PackedLinear, m: int, config: LinearConfig | None = None) -> int:
    """Bytes of workspace that a product of m rows needs; products on one stream share a workspace."""
    config = default_config(weight.kind, m) if config is None else config
    tiles = cut(weight, m, config)
    sums = 4 * tiles.programs * (config.block_n + 1) * config.block_m if tiles.is_split else 0
    return COUNTER_BYTES + sums


def linear(
    x: torch.Tensor,
    weight: PackedLinear,
    out: torch.Tensor,
    *,
    norm: tuple[torch.Tensor, float] | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str | None = None,
    x_scale: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    config: LinearConfig | None = None,
) -> None:
    """out = act(norm(x) @ weight.T + bias) + residual.

    x: [M, K] of weight.dtype, dense rows of any stride. out: [M, weight.out_features], rows of any stride, of a float
    type. norm: (weight [K], eps): x / sqrt(mean(x^2) + eps) * weight first, rounded once, before the division (so
    x * weight must be finite in x's type). bias: [weight.shape[0]] in the order of the sources. residual: as out, which
    it may be. activation: "silu" or "gelu_tanh" exactly when the weight is gated: act(gate) * up. workspace: uint8,
    `workspace_bytes`, 16-byte aligned, zero before its first use; None where the product is not split.
    """
    m = x.shape[0]
    config = default_config(weight.kind, m) if config is None else config
    _check(x, weight, out, norm, bias, residual, x_scale, activation)
    if m == 0:
        return
    tiles = cut(weight, m, config)
    partials = counters = None
    if tiles.is_split:
        need = workspace_bytes(weight, m, config)
        if workspace is None or workspace.dtype != torch.uint8 or workspace.numel() < need:
            raise ValueError(f"linear: needs a workspace of {need} bytes (uint8)")
        counters = workspace[:COUNTER_BYTES].view(torch.int32)
        partials = workspace[COUNTER_BYTES:need].view(torch.float32)
    launch = _launch_packed if weight.kind in PLANES else _launch_direct
    launch(x, weight, out, norm, bias, residual, x_scale, activation, partials, counters, tiles, config)


def _launch_packed(
    x: torch.Tensor,
    weight: PackedLinear,
    out: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    activation: str | None,
    partials: torch.Tensor | None,
    counters: torch.Tensor | None,
    tiles: Tiles,
    config: LinearConfig,
) -> None:
    layout = weight.blocks
    norm_weight, eps = (None, 0.0) if norm is None else norm
    packed_kernel[(tiles.programs,)](
        x,
        weight.tensors["words"],
        weight.tensors["scales"],
        weight.tensors.get("zeros"),
        out,
        norm_weight,
        bias,
        residual,
        partials,
        counters,
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
        eps,
        PLANES=layout.planes,
        GROUPS=layout.groups,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=layout.block_k,
        LOG2_WORDS=layout.words.bit_length() - 1,
        SPLITS=tiles.splits,
        SPLIT_GRID=tiles.is_split,
        GROUP_N=config.group_n,
        EVEN_K=weight.shape[1] % layout.block_k == 0,
        ACTIVATION=activation,
        INLINE_ASM=weight.dtype != torch.float32 and _has_ptx(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _launch_direct(
    x: torch.Tensor,
    weight: PackedLinear,
    out: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    activation: str | None,
    partials: torch.Tensor | None,
    counters: torch.Tensor | None,
    tiles: Tiles,
    config: LinearConfig,
) -> None:
    block_k = weight.blocks.block_k
    norm_weight, eps = (None, 0.0) if norm is None else norm
    values, scales = weight.tensors["weight"], weight.tensors.get("scales")
    if values.dtype == torch.float8_e4m3fn and x.dtype != torch.float8_e4m3fn:
        values = values.view(torch.uint8)
    direct_kernel[(tiles.programs,)](
        x,
        values,
        out,
        norm_weight,
        bias,
        residual,
        x_scale,
        scales,
        partials,
        counters,
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
        0 if scales is None else scales.stride(0),
        eps,
        IS_BLOCK_SCALED=weight.kind == "fp8_block",
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        LOG2_BLOCK_K=block_k.bit_length() - 1,
        SPLITS=tiles.splits,
        SPLIT_GRID=tiles.is_split,
        GROUP_N=config.group_n,
        EVEN_K=weight.shape[1] % block_k == 0,
        EVEN_N=weight.packed_rows % config.block_n == 0,
        ACTIVATION=activation,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _has_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU; the interpreter has no target, and runs the plain forms."""
    if triton.knobs.runtime.interpret:
        return False
    return bool(triton.runtime.driver.active.get_current_target().backend == "cuda")


def _check(
    x: torch.Tensor,
    weight: PackedLinear,
    out: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    activation: str | None,
) -> None:
    n, k = weight.shape
    quantized = QUANTIZED.get(weight.kind)
    if x.ndim != 2 or x.shape[1] != k or x.stride(1) != 1 or x.dtype not in (weight.dtype, quantized):
        raise ValueError(f"linear: x {_describe(x)}: want [M, {k}] {weight.dtype}, dense along a row")
    if (x.dtype == quantized) != (x_scale is not None) or (x_scale is not None and norm is not None):
        raise ValueError(f"linear: x_scale belongs to quantised x, x is {x.dtype}; norm to x of {weight.dtype}")
    if weight.kind == "w8a8" and x.dtype != torch.int8:
        raise ValueError(f"linear: int8 weights of a w8a8 matrix take int8 x, not {x.dtype}")
    if x_scale is not None:
        want = (x.shape[0], -(-k // 128)) if weight.kind == "fp8_block" else (x.shape[0],)
        if x_scale.shape != want or x_scale.dtype != torch.float32 or x_scale.stride(-1) != 1:
            raise ValueError(f"linear: x_scale {_describe(x_scale)}: want {list(want)} float32")
    for name, tensor in (("out", out), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.shape != (x.shape[0], weight.out_features) or tensor.stride(1) != 1 or tensor.dtype not in FLOATS:
            raise ValueError(
                f"linear: {name} {_describe(tensor)}: want [{x.shape[0]}, {weight.out_features}] of a float type"
            )
    for name, tensor, size in (("norm", None if norm is None else norm[0], k), ("bias", bias, n)):
        if tensor is not None and (tensor.shape != (size,) or tensor.stride(0) != 1 or tensor.dtype not in FLOATS):
            raise ValueError(f"linear: {name} {_describe(tensor)}: want [{size}] of a float type")
    if weight.is_gated != (activation is not None) or activation not in (None, "silu", "gelu_tanh"):
        raise ValueError(f"linear: activation {activation!r} with a matrix that is {weight.is_gated=}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
