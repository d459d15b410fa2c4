"""The product of many rows with int4 or int8 weights in groups. Launched by `triton_persistent.py`.

As `triton_packed.py`, and with its bits. Two things differ. A program takes tiles one after the other, in the order of
`triton_tile.tile_at`. And zeros enter through sums of x that a launch before it has made once for all rows of weights:
with many rows the products with ones that `triton_packed.py` makes in every tile are half of the matrix unit's work.
x is read by cp.async: a block of K is one descriptor per plane, and their barriers cost more than the addresses.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_finish import finish
from headrace.kernels.linear.triton_packed import TILE, _group, _load_groups, _load_rows
from headrace.kernels.linear.triton_tile import tile_at
from headrace.kernels.linear.triton_unpack import int4_plane, int8_plane


@triton.jit
def persistent_packed_kernel(
    x,
    words,
    scales,
    zeros,
    group_sums,
    out,
    bias,
    residual,
    heads,
    x_scale,
    M,
    num_rows,
    out_features,
    K,
    num_blocks,
    num_n,
    num_m,
    stride_x,
    stride_sums,
    stride_out,
    stride_residual,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_FLAGS: tl.constexpr,
    HEAD_BLOCK_SIZE: tl.constexpr,
    INLINE_ASM: tl.constexpr,
):
    """As `triton_packed.packed_kernel`, without a norm and without chunks of K as programs of their own.

    group_sums: what `group_sums_kernel` left, None exactly where zeros is.
    """
    per_chunk = (num_blocks + SPLITS - 1) // SPLITS
    for index in tl.range(tl.program_id(0), num_n * num_m, tl.num_programs(0)):
        tile_n, tile_m = tile_at(index, num_n, num_m, GROUP_N)
        if SPLITS == 1:
            total = _sum_blocks(
                x, words, scales, zeros, group_sums, tile_n, tile_m, M, num_rows, K, num_blocks, stride_x, stride_sums,
                0, num_blocks, PLANES, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INLINE_ASM,
            )  # fmt: skip
        else:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.range(0, SPLITS):
                total += _sum_blocks(
                    x, words, scales, zeros, group_sums, tile_n, tile_m, M, num_rows, K, num_blocks, stride_x,
                    stride_sums, part * per_chunk, tl.minimum(part * per_chunk + per_chunk, num_blocks),
                    PLANES, GROUPS, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, INLINE_ASM,
                )  # fmt: skip
        finish(
            total, None, x_scale, None, out, residual, bias, heads,
            None, None, tile_n, tile_m, num_m, 0, M, K, num_rows, out_features,
            stride_out, stride_residual, 0.0, SPLITS, False, False, ACTIVATION, HEAD_FLAGS, HEAD_BLOCK_SIZE,
        )  # fmt: skip


@triton.jit
def _sum_blocks(
    x,
    words,
    scales,
    zeros,
    group_sums,
    tile_n,
    tile_m,
    M,
    num_rows,
    K,
    num_blocks,
    stride_x,
    stride_sums,
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
    """Sums [BLOCK_N, BLOCK_M] over blocks first .. last - 1: the order of `triton_packed.py`."""
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
                sums = tl.load(group_sums + (block * GROUPS + group) * stride_sums + m)
                acc += sums[None, :] * zero[:, None]
    return acc


@triton.jit
def group_sums_kernel(
    x,
    out,
    M,
    K,
    num_blocks,
    stride_x,
    stride_out,
    PLANES: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out float32 [num_blocks * GROUPS, stride_out >= M]: sums of x [M, K] over each group's columns, zero beyond M.

    A program's BLOCK_M rows and BLOCKS blocks of K. By the products with ones of `triton_packed.py`, for their bits.
    """
    WORDS: tl.constexpr = BLOCK_K // PLANES
    PER_GROUP: tl.constexpr = PLANES // GROUPS
    ROWS: tl.constexpr = 16  # of ones: the fewest that the matrix unit takes
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, WORDS)
    in_m = (m < M)[:, None]
    ones = tl.full([ROWS, WORDS], 1.0, x.dtype.element_ty)
    is_first = (tl.arange(0, ROWS) == 0)[:, None]
    x += (m.to(tl.int64) * stride_x)[:, None] + column[None, :]
    first = tl.program_id(1) * BLOCKS
    for block in tl.range(first, tl.minimum(first + BLOCKS, num_blocks)):
        for group in tl.static_range(GROUPS):
            part = tl.zeros([ROWS, BLOCK_M], tl.float32)
            for plane in tl.static_range(PER_GROUP):
                offset = block * BLOCK_K + (group * PER_GROUP + plane) * WORDS
                a = _load_rows(x + offset, in_m, column, K - offset, EVEN_K)
                part = tl.dot(ones, tl.trans(a), part, input_precision="ieee")
            place = out + (block * GROUPS + group).to(tl.int64) * stride_out + m
            tl.store(place, tl.sum(tl.where(is_first, part, 0.0), axis=0))  # all rows are the same
