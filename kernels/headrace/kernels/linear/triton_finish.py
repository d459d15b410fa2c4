"""The end of a product's program: chunks of K brought together, then what is fused. Called by `triton_packed.py` and
`triton_direct.py`.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_heads import finish_head
from headrace.kernels.linear.triton_next_norm import (
    HAS_NEXT_NORM,
    HAS_SQUARES,
    factor_of_rows,
    finish_and_norm,
)
from headrace.kernels.linear.triton_out_scale import HAS_OUT_SCALE, finish_and_quantize
from headrace.kernels.linear.triton_tile import add_chunks, finish_tile, keep_chunk, scale_rows


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
    [BLOCK_M], likewise. x_scale: float32 [M], RowSquares, or None. w_scale: float32 [num_rows] or None. heads: Heads,
    NextNormOut, OutScale, or None. HEAD_FLAGS: the HAS_* of the modules that these come from."""
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
    if HAS_SQUARES & HEAD_FLAGS:
        acc = acc * factor_of_rows(x_scale, first_m, M, K, acc.shape[1])[None, :]
    else:
        acc = scale_rows(acc, squares, x_scale, first_m, M, K, eps, HAS_NORM)
    if HAS_NEXT_NORM & HEAD_FLAGS:
        finish_and_norm(
            acc, out, residual, bias, heads, first_row, first_m, M, num_rows, stride_out, stride_residual,
        )  # fmt: skip
    elif HAS_OUT_SCALE & HEAD_FLAGS:
        finish_and_quantize(
            acc, out, bias, heads, first_row, first_m, M, num_rows, out_features, stride_out, ACTIVATION,
            HEAD_FLAGS,
        )  # fmt: skip
    elif heads is None:
        finish_tile(
            acc, squares, None, out, residual, bias, first_row, first_m, M, K, num_rows, out_features,
            stride_out, stride_residual, eps, ACTIVATION, False,
        )  # fmt: skip
    else:
        finish_head(
            acc, squares, None, out, bias, heads, tile_n, first_m, M, K, num_rows, stride_out, eps,
            False, HEAD_FLAGS, HEAD_BLOCK_SIZE,
        )  # fmt: skip
