"""The end of a product's program: chunks of K brought together, then what is fused. Called by `triton_packed.py` and
`triton_direct.py`.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_heads import finish_head
from headrace.kernels.linear.triton_tile import add_chunks, finish_tile, keep_chunk


@triton.jit
def finish(
    acc,
    squares,
    x_scale,
    w_scale,
    out,
    residual,
    bias,
    heads,
    partials,
    counters,
    tile_n,
    tile_m,
    num_m,
    chunk,
    M,
    K,
    num_rows,
    out_features,
    stride_out,
    stride_residual,
    eps,
    SPLITS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_FLAGS: tl.constexpr,
    HEAD_BLOCK_SIZE: tl.constexpr,
):
    """acc: float32 [BLOCK_N, BLOCK_M], sums over this program's chunk, or all of K unless SPLIT_GRID. squares:
    [BLOCK_M], likewise. w_scale: float32 [num_rows] or None. HEAD_FLAGS: `triton_heads.HAS_*`."""
    if SPLIT_GRID:
        tile = tile_n * num_m + tile_m
        before = keep_chunk(acc, squares, partials, counters, tile, chunk, SPLITS, HAS_NORM)
        if before == SPLITS - 1:  # the last of this tile's programs
            acc, squares = add_chunks(acc, partials, counters, tile, SPLITS, HAS_NORM)
            _write(
                acc, squares, x_scale, w_scale, out, residual, bias, heads, tile_n, tile_m, M, K, num_rows,
                out_features, stride_out, stride_residual, eps, HAS_NORM, ACTIVATION, HEAD_FLAGS, HEAD_BLOCK_SIZE,
            )  # fmt: skip
    else:
        _write(
            acc, squares, x_scale, w_scale, out, residual, bias, heads, tile_n, tile_m, M, K, num_rows,
            out_features, stride_out, stride_residual, eps, HAS_NORM, ACTIVATION, HEAD_FLAGS, HEAD_BLOCK_SIZE,
        )  # fmt: skip


@triton.jit
def _write(
    acc,
    squares,
    x_scale,
    w_scale,
    out,
    residual,
    bias,
    heads,
    tile_n,
    tile_m,
    M,
    K,
    num_rows,
    out_features,
    stride_out,
    stride_residual,
    eps,
    HAS_NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_FLAGS: tl.constexpr,
    HEAD_BLOCK_SIZE: tl.constexpr,
):
    first_row, first_m = tile_n * acc.shape[0], tile_m * acc.shape[1]
    if w_scale is not None:
        row = first_row + tl.arange(0, acc.shape[0])
        acc = acc * tl.load(w_scale + row, mask=row < num_rows, other=0.0)[:, None]
    if heads is None:
        finish_tile(
            acc, squares, x_scale, out, residual, bias, first_row, first_m, M, K, num_rows, out_features,
            stride_out, stride_residual, eps, ACTIVATION, HAS_NORM,
        )  # fmt: skip
    else:
        finish_head(
            acc, squares, x_scale, out, bias, heads, tile_n, first_m, M, K, num_rows, stride_out, eps,
            HAS_NORM, HEAD_FLAGS, HEAD_BLOCK_SIZE,
        )  # fmt: skip
