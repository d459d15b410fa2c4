"""A norm between two products, without a launch and without a prologue: the one before it multiplies by the norm's
weight and squares what it adds to the residual; the one after it divides by the root of the squares' sum.

A prologue does both in every program of the second product, in its loop: 113 of 299 instructions of a block of int4 in
groups of 128 on sm_90 with 16 rows (docs/KERNELS.md), and more with more rows, whose squares are a product of the
matrix unit. Here they are a dozen in the tail of the first. Called by `triton_finish.py`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from headrace.kernels.linear.layout import SQUARES_COLUMNS as _SQUARES_COLUMNS
from headrace.kernels.linear.triton_heads import sum_rows
from headrace.kernels.linear.triton_tile import add_bias, norm_factor

SQUARES_COLUMNS = tl.constexpr(_SQUARES_COLUMNS)

# Bits of HEAD_FLAGS beside those of `triton_heads`.
HAS_SQUARES = tl.constexpr(8)  # x_scale is a RowSquares
HAS_NEXT_NORM = tl.constexpr(16)  # heads is a NextNormOut


class RowSquares(NamedTuple):
    """Sums of squares of rows of x, [M, count] float32, a column for each SQUARES_COLUMNS of x before its norm."""

    squares: Any
    stride: Any
    count: Any
    eps: Any


class NextNormOut(NamedTuple):
    """Where `epilogue.NextNorm` wants its two results; num_squares: columns of the second."""

    weight: Any
    normed: Any
    squares: Any
    stride_normed: Any
    stride_squares: Any
    num_squares: Any


@triton.jit
def factor_of_rows(rows, first_m, M, K, BLOCK_M: tl.constexpr):
    """float32 [BLOCK_M]: 1 / sqrt(mean of squares + eps). In one order, whatever the layout: columns i, i + 16, ... of
    the squares, then the 16 sums as a tree."""
    m = first_m + tl.arange(0, BLOCK_M)
    column = tl.arange(0, 16)
    place = rows.squares + m.to(tl.int64)[None, :] * rows.stride + column[:, None]
    total = tl.zeros([16, BLOCK_M], tl.float32)
    for begin in tl.range(0, rows.count, 16):
        mask = (m < M)[None, :] & (begin + column < rows.count)[:, None]
        total += tl.load(place + begin, mask=mask, other=0.0)
    return norm_factor(sum_rows(total), K, rows.eps)


@triton.jit
def finish_and_norm(
    acc, out, residual, bias, following, first_row, first_m, M, num_rows, stride_out, stride_residual
):  # fmt: skip
    """Bias, residual and store of a tile [BLOCK_N, BLOCK_M] as `triton_tile.finish_tile`; then what is stored times the
    norm's weight, rounded once, and the squares of what is stored."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    acc = add_bias(acc, bias, first_row, num_rows, num_rows, False)
    column = first_row + tl.arange(0, BLOCK_N)
    m = first_m + tl.arange(0, BLOCK_M)
    mask = (column < num_rows)[:, None] & (m < M)[None, :]
    m = m.to(tl.int64)
    if residual is not None:
        place = residual + m[None, :] * stride_residual + column[:, None]
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    stored = acc.to(out.dtype.element_ty)
    tl.store(out + m[None, :] * stride_out + column[:, None], stored, mask=mask)
    weight = tl.load(following.weight + column, mask=column < num_rows, other=0.0).to(stored.dtype)
    place = following.normed + m[None, :] * following.stride_normed + column[:, None]
    tl.store(place, stored * weight[:, None], mask=mask)
    value = tl.where(mask, stored.to(tl.float32), 0.0)
    squares = _sum_pieces(value * value)
    piece = first_row // SQUARES_COLUMNS + tl.arange(0, BLOCK_N // SQUARES_COLUMNS)
    mask = (piece < following.num_squares)[:, None] & (m < M)[None, :]
    tl.store(following.squares + m[None, :] * following.stride_squares + piece[:, None], squares, mask=mask)


@triton.jit
def _sum_pieces(values):
    """float32 [R, C] to [R / SQUARES_COLUMNS, C]: each piece of rows as a tree, in one order whatever the layout."""
    PIECES: tl.constexpr = values.shape[0] // SQUARES_COLUMNS
    COLS: tl.constexpr = values.shape[1]
    for step in tl.static_range(5):  # 2^5 = SQUARES_COLUMNS
        halves = tl.permute(tl.reshape(values, (PIECES, 2, SQUARES_COLUMNS >> (step + 1), COLS)), (0, 2, 3, 1))
        a, b = tl.split(halves)
        values = a + b
    return tl.reshape(values, (PIECES, COLS))
