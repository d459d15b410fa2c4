"""The product with int4 or int8 weights in groups, and activations of 16 or 32 bits. Called by `triton.py`.

Per block of K: one contiguous piece of packed words, unpacked in registers; per group one product on the matrix unit
and one FMA with the scale, so that no weight is rounded. Zeros enter through the group's sum of x, which a product with
ones leaves where it is needed: exact, and cheaper than moving a sum across threads. See `layout.py` for the places.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_finish import finish
from headrace.kernels.linear.triton_tile import (
    add_squares,
    squares_of,
    tile_of_program,
    times_norm_weight,
)
from headrace.kernels.linear.triton_unpack import int4_plane, int8_plane

TILE = tl.constexpr(64)  # layout.TILE


@triton.jit
def packed_kernel(
    x,
    words,
    scales,
    zeros,
    out,
    norm_weight,
    bias,
    residual,
    heads,
    x_scale,
    partials,
    counters,
    M,
    num_rows,
    out_features,
    K,
    num_blocks,
    num_n,
    num_m,
    stride_x,
    stride_out,
    stride_residual,
    eps,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_FLAGS: tl.constexpr,
    HEAD_BLOCK_SIZE: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """out [M, out_features] = epilogue(norm(x [M, K]) @ weight.T); see `triton.py` for the arguments' meaning.

    num_rows: of the packed weight. num_blocks: of BLOCK_K columns, the last one padded. num_n, num_m: tiles.
    """
    HAS_NORM: tl.constexpr = norm_weight is not None
    tile_n, tile_m, chunk = tile_of_program(num_n, num_m, SPLITS, SPLIT_GRID, GROUP_N)
    per_chunk = (num_blocks + SPLITS - 1) // SPLITS
    if SPLIT_GRID or SPLITS == 1:
        total, squares = _sum_blocks(
            x, words, scales, zeros, norm_weight, tile_n, tile_m, M, num_rows, K, num_blocks, stride_x,
            chunk * per_chunk, tl.minimum(chunk * per_chunk + per_chunk, num_blocks),
            PLANES, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INLINE_ASM,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.range(0, SPLITS):
            acc, sq = _sum_blocks(
                x, words, scales, zeros, norm_weight, tile_n, tile_m, M, num_rows, K, num_blocks, stride_x,
                part * per_chunk, tl.minimum(part * per_chunk + per_chunk, num_blocks),
                PLANES, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INLINE_ASM,
            )  # fmt: skip
            total += acc
            squares += sq
    finish(
        total, squares, x_scale, None, out, residual, bias, heads,
        partials, counters, tile_n, tile_m, num_m, chunk, M, K, num_rows, out_features,
        stride_out, stride_residual, eps, SPLITS, SPLIT_GRID, HAS_NORM, ACTIVATION, HEAD_FLAGS, HEAD_BLOCK_SIZE,
    )  # fmt: skip


@triton.jit
def _sum_blocks(
    x,
    words,
    scales,
    zeros,
    norm_weight,
    tile_n,
    tile_m,
    M,
    num_rows,
    K,
    num_blocks,
    stride_x,
    first,
    last,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """(sums [BLOCK_N, BLOCK_M], sums of squares of x [BLOCK_M]) over blocks first .. last - 1."""
    HAS_NORM: tl.constexpr = norm_weight is not None
    WORDS: tl.constexpr = BLOCK_K // PLANES
    PER_GROUP: tl.constexpr = PLANES // GROUPS
    dtype: tl.constexpr = x.dtype.element_ty
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = row // TILE
    if BLOCK_N > TILE:  # there may be no last tile for the last rows, which nobody stores
        tile = tl.minimum(tile, (num_rows - 1) // TILE)
    stored = tile.to(tl.int64) * num_blocks  # the tile's first block
    column = tl.arange(0, WORDS)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = (m < M)[:, None]
    words += (stored * (TILE * WORDS) + row % TILE * WORDS)[:, None] + column[None, :]
    x += (m.to(tl.int64) * stride_x)[:, None] + column[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    products = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    ones = tl.full([BLOCK_N, WORDS], 1.0, dtype)
    for block in tl.range(first, last):
        packed = tl.load(words + block * (TILE * WORDS))
        scale_word = _load_groups(scales, stored, row, block, GROUPS)
        if zeros is not None:
            zero_word = _load_groups(zeros, stored, row, block, GROUPS)
        for group in tl.static_range(GROUPS):
            scale = _group(scales, scale_word, stored, row, block, group, GROUPS)
            part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for plane in tl.static_range(PER_GROUP):
                offset = block * BLOCK_K + (group * PER_GROUP + plane) * WORDS
                a = _load_rows(x + offset, in_m, column, K - offset, EVEN_K)
                if HAS_NORM:
                    products = add_squares(products, a)
                    a = times_norm_weight(a, norm_weight + offset, K - offset, EVEN_K)
                if PLANES == 4:
                    weight = int4_plane(packed, group * PER_GROUP + plane, dtype, INLINE_ASM)
                else:
                    weight = int8_plane(packed, group * PER_GROUP + plane, dtype, INLINE_ASM)
                part = tl.dot(weight, tl.trans(a), part, input_precision="ieee")
            acc += part * scale[:, None]
            if zeros is not None:
                zero = _group(zeros, zero_word, stored, row, block, group, GROUPS)
                if PLANES == 4:
                    zero += scale * 8.0  # the planes are less 8
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                for plane in tl.static_range(PER_GROUP):
                    offset = block * BLOCK_K + (group * PER_GROUP + plane) * WORDS
                    a = _load_rows(x + offset, in_m, column, K - offset, EVEN_K)
                    if HAS_NORM:
                        a = times_norm_weight(a, norm_weight + offset, K - offset, EVEN_K)
                    part = tl.dot(ones, tl.trans(a), part, input_precision="ieee")
                acc += part * zero[:, None]
    if HAS_NORM:
        squares = squares_of(products)
    else:
        squares = tl.zeros([BLOCK_M], tl.float32)
    return acc, squares


@triton.jit
def _load_rows(place, in_m, column, columns_left, EVEN_K: tl.constexpr):
    """A plane's columns of x, zero outside of it."""
    if EVEN_K:
        return tl.load(place, mask=in_m, other=0.0)
    else:
        return tl.load(place, mask=in_m & (column < columns_left)[None, :], other=0.0)


@triton.jit
def _load_groups(values, stored, row, block, GROUPS: tl.constexpr):
    """Float16 scales of all groups of a block in one word a row; nothing yet where they are float32."""
    if values.dtype.element_ty == tl.float32:
        return 0
    else:
        return tl.load(values + (stored + block) * TILE + row % TILE)


@triton.jit
def _group(values, word, stored, row, block, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """float32 [BLOCK_N]: the scales of one group."""
    if values.dtype.element_ty == tl.float32:
        return tl.load(values + ((stored + block) * GROUPS + GROUP) * TILE + row % TILE)
    else:
        return (word >> (16 * GROUP)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
