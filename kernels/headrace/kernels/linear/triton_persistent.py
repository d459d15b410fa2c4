"""Launches products of many rows: a program per SM, descriptors, sums of groups. Called by `triton.py`.

A descriptor is made anew for every launch (its address is the tensor's); triton encodes it on the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.pack import PackedLinear
from headrace.kernels.linear.triton_arguments import row_scale_of
from headrace.kernels.linear.triton_heads import Heads
from headrace.kernels.linear.triton_next_norm import NextNormOut
from headrace.kernels.linear.triton_out_scale import OutScale
from headrace.kernels.linear.triton_persistent_direct import persistent_direct_kernel
from headrace.kernels.linear.triton_persistent_packed import group_sums_kernel, persistent_packed_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

if TYPE_CHECKING:
    from headrace.kernels.linear.triton import Operands, Tiles

SUM_ROWS = 64  # of x per program of the launch that sums groups
SUM_BLOCKS = 8  # of K per program of it
PADDED_ROWS = 256  # the most rows of a tile: sums of groups are stored for whole tiles
CHECKED_SMS = 3  # where there is no GPU: few, so that every program has several tiles


def group_sums_bytes(weight: PackedLinear, m: int, config: LinearConfig) -> int:
    """Bytes of workspace for the sums of groups of m rows; 0 where none are needed."""
    if not config.programs_per_sm or "zeros" not in weight.tensors:
        return 0
    layout = weight.blocks
    return 4 * -(-weight.shape[1] // layout.block_k) * layout.groups * _padded(m)


def launch_packed(
    operands: Operands,
    weight: PackedLinear,
    heads: Heads | NextNormOut | OutScale | None,
    tiles: Tiles,
    config: LinearConfig,
    constants: Mapping[str, Any],
    workspace: torch.Tensor | None,
) -> None:
    """int4 and int8. constants: of `triton_packed.packed_kernel`. workspace: `group_sums_bytes`, of any content."""
    x, out, residual, layout = operands.x, operands.out, operands.residual, weight.blocks
    num_blocks = -(-weight.shape[1] // layout.block_k)
    zeros, sums = weight.tensors.get("zeros"), None
    if zeros is not None:
        assert workspace is not None
        sums = workspace.view(torch.float32).view(num_blocks * layout.groups, -1)
        _sum_groups(x, weight, sums, is_even=constants["EVEN_K"])
    persistent_packed_kernel[(_programs(tiles, config, x.device),)](
        x,
        weight.tensors["words"],
        weight.tensors["scales"],
        zeros,
        sums,
        out,
        operands.bias,
        residual,
        heads,
        row_scale_of(operands),
        x.shape[0],
        weight.packed_rows,
        weight.out_features,
        weight.shape[1],
        num_blocks,
        tiles.n,
        tiles.m,
        x.stride(0),
        0 if sums is None else sums.stride(0),
        out.stride(0),
        0 if residual is None else residual.stride(0),
        **{name: value for name, value in constants.items() if name != "SPLIT_GRID"},
    )


def launch_direct(
    operands: Operands,
    weight: PackedLinear,
    values: torch.Tensor,
    heads: Heads | NextNormOut | OutScale | None,
    tiles: Tiles,
    config: LinearConfig,
    constants: Mapping[str, Any],
) -> None:
    """The other kinds. values: the weights as the kernel takes them. constants: of `triton_direct.direct_kernel`."""
    x, out, residual, x_scale = operands.x, operands.out, operands.residual, operands.x_scale
    scales, block_k = weight.tensors.get("scales"), weight.blocks.block_k
    has_tma = config.has_tma and _fits_descriptor(x) and _fits_descriptor(values)
    persistent_direct_kernel[(_programs(tiles, config, x.device),)](
        _descriptor(x, config.block_m, block_k) if has_tma else x,
        _descriptor(values, config.block_n, block_k) if has_tma else values,
        out,
        operands.bias,
        residual,
        heads,
        row_scale_of(operands),
        scales,
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
        HAS_TMA=has_tma,
        **{name: value for name, value in constants.items() if name != "SPLIT_GRID"},
    )


def _sum_groups(x: torch.Tensor, weight: PackedLinear, sums: torch.Tensor, *, is_even: bool) -> None:
    layout = weight.blocks
    num_blocks = sums.shape[0] // layout.groups
    group_sums_kernel[(sums.shape[1] // SUM_ROWS, -(-num_blocks // SUM_BLOCKS))](
        x,
        sums,
        x.shape[0],
        weight.shape[1],
        num_blocks,
        x.stride(0),
        sums.stride(0),
        PLANES=layout.planes,
        GROUPS=layout.groups,
        BLOCK_M=SUM_ROWS,
        BLOCK_K=layout.block_k,
        BLOCKS=SUM_BLOCKS,
        EVEN_K=is_even,
        num_warps=4,
        num_stages=3,
    )


def _padded(m: int) -> int:
    return -(-m // PADDED_ROWS) * PADDED_ROWS


def _programs(tiles: Tiles, config: LinearConfig, device: torch.device) -> int:
    return min(tiles.n * tiles.m, config.programs_per_sm * num_sms(device))


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU."""
    if device.type != "cuda":
        return CHECKED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _fits_descriptor(tensor: torch.Tensor) -> bool:
    """Whether TMA can read rows of a matrix: it wants 16-byte steps (CUDA driver API, cuTensorMapEncodeTiled)."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(0) * tensor.element_size() % 16 == 0


def _descriptor(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])
