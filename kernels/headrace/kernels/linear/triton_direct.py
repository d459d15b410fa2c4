"""The product whose operands go to the matrix unit as they lie: dense, int8 by int8, fp8. Called by `triton.py`,
and `sum_blocks` by `triton_persistent_direct.py`.

With fp8 weights and x of 16 or 32 bits (a GPU without fp8, or rows too few to quantise) weights become x's type, bit by
bit: exact. Sums of int8 are integers within a chunk of K; sums of fp8 go to float32 block by block, as Hopper's matrix
unit keeps only some 14 bits of a long fp8 sum (DeepSeek-V3 report, section 3.3.2).
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_finish import finish
from headrace.kernels.linear.triton_tile import (
    GATE_ROWS,
    add_squares,
    squares_of,
    tile_of_program,
    times_norm_weight,
)

SCALE_BLOCK = tl.constexpr(128)  # rows and columns per scale of fp8_block


@triton.jit
def direct_kernel(
    x,
    weight,
    out,
    norm_weight,
    bias,
    residual,
    heads,
    x_scale,
    w_scale,
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
    stride_w,
    stride_out,
    stride_residual,
    stride_x_scale,
    stride_x_scale_k,
    stride_w_scale,
    eps,
    IS_BLOCK_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_GRID: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_FLAGS: tl.constexpr,
    HEAD_BLOCK_SIZE: tl.constexpr,
):
    """out [M, out_features] = epilogue(norm(x [M, K]) @ weight.T); see `triton.py` for the arguments' meaning.

    x_scale: float32 [M], or [M, ceil(K / 128)] where IS_BLOCK_SCALED. w_scale: [num_rows], or [., ceil(K / 128)],
    gate's blocks of 128 rows before up's.
    num_blocks: of BLOCK_K columns. num_n, num_m: tiles.
    """
    HAS_NORM: tl.constexpr = norm_weight is not None
    tile_n, tile_m, chunk = tile_of_program(num_n, num_m, SPLITS, SPLIT_GRID, GROUP_N)
    per_chunk = (num_blocks + SPLITS - 1) // SPLITS
    if SPLIT_GRID or SPLITS == 1:
        total, squares = sum_blocks(
            x, weight, norm_weight, x_scale, w_scale, tile_n, tile_m, M, num_rows, K,
            stride_x, stride_w, stride_x_scale, stride_x_scale_k, stride_w_scale,
            chunk * per_chunk, tl.minimum(chunk * per_chunk + per_chunk, num_blocks),
            IS_BLOCK_SCALED, ACTIVATION is not None, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, False,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.range(0, SPLITS):
            acc, sq = sum_blocks(
                x, weight, norm_weight, x_scale, w_scale, tile_n, tile_m, M, num_rows, K,
                stride_x, stride_w, stride_x_scale, stride_x_scale_k, stride_w_scale,
                part * per_chunk, tl.minimum(part * per_chunk + per_chunk, num_blocks),
                IS_BLOCK_SCALED, ACTIVATION is not None, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, False,
            )  # fmt: skip
            total += acc
            squares += sq
    finish(
        total, squares, None if IS_BLOCK_SCALED else x_scale, None if IS_BLOCK_SCALED else w_scale, out, residual,
        bias, heads, partials, counters, tile_n, tile_m, num_m, chunk, M, K, num_rows, out_features,
        stride_out, stride_residual, eps, SPLITS, SPLIT_GRID, HAS_NORM, ACTIVATION, HEAD_FLAGS, HEAD_BLOCK_SIZE,
    )  # fmt: skip


@triton.jit
def sum_blocks(
    x,
    weight,
    norm_weight,
    x_scale,
    w_scale,
    tile_n,
    tile_m,
    M,
    num_rows,
    K,
    stride_x,
    stride_w,
    stride_x_scale,
    stride_x_scale_k,
    stride_w_scale,
    first,
    last,
    IS_BLOCK_SCALED: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_TMA: tl.constexpr,
):
    """(sums [BLOCK_N, BLOCK_M], sums of squares of x [BLOCK_M]), float32, over blocks first .. last - 1.

    HAS_TMA: x and weight are tensor descriptors of blocks of BLOCK_K columns, zero outside of the tensors.
    """
    HAS_NORM: tl.constexpr = norm_weight is not None
    dtype: tl.constexpr = x.dtype if HAS_TMA else x.dtype.element_ty
    stored: tl.constexpr = weight.dtype if HAS_TMA else weight.dtype.element_ty
    sum_dtype: tl.constexpr = tl.int32 if dtype == tl.int8 else tl.float32
    row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_K)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = (m < M)[:, None]
    in_n = (row < num_rows)[:, None]
    if not HAS_TMA:
        weight += (row.to(tl.int64) * stride_w)[:, None] + column[None, :]
        x += (m.to(tl.int64) * stride_x)[:, None] + column[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], sum_dtype)
    products = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    for block in tl.range(first, last):
        offset = block * BLOCK_K
        if HAS_TMA:
            w = weight.load([tile_n * BLOCK_N, offset])
            a = x.load([tile_m * BLOCK_M, offset])
        else:
            w = _load(weight + offset, in_n, column, K - offset, EVEN_N, EVEN_K)
            a = _load(x + offset, in_m, column, K - offset, False, EVEN_K)
        if HAS_NORM:
            products = add_squares(products, a)
            a = times_norm_weight(a, norm_weight + offset, K - offset, EVEN_K)
        if stored == tl.uint8:
            w = from_e4m3_bits(w, dtype)
        if IS_BLOCK_SCALED:
            part = tl.dot(w, tl.trans(a), input_precision="ieee")
            scale = offset // SCALE_BLOCK
            xs = None
            if x_scale is not None:
                xs = tl.load(x_scale + m * stride_x_scale + scale * stride_x_scale_k, mask=m < M, other=0.0)
            factor = _block_factor(w_scale + scale, xs, tile_n, num_rows, stride_w_scale, IS_GATED, BLOCK_N)
            acc += part * factor
        elif dtype == tl.float8e4nv:
            acc += tl.dot(w, tl.trans(a), input_precision="ieee")
        else:
            acc = tl.dot(w, tl.trans(a), acc, input_precision="ieee", out_dtype=sum_dtype)
    if HAS_NORM:
        squares = squares_of(products)
    else:
        squares = tl.zeros([BLOCK_M], tl.float32)
    return acc.to(tl.float32), squares


@triton.jit
def _block_factor(w_scale, xs, tile_n, num_rows, stride, IS_GATED: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a tile's sums over one block of K count: scales of its rows times xs [BLOCK_M], as a matrix.

    w_scale: [., K / 128] at that block of K. Gate and up keep their own blocks of 128 rows, gate's first. A tile of at
    most 128 rows (256 of a gated matrix) lies in one block of each, whose scale is one number.
    """
    WIDTH: tl.constexpr = 2 * SCALE_BLOCK if IS_GATED else SCALE_BLOCK
    if BLOCK_N <= WIDTH:
        first = w_scale + tile_n * BLOCK_N // WIDTH * stride
        factor = _times_rows(tl.load(first), xs)
        if IS_GATED:
            row = tl.arange(0, BLOCK_N)
            up = _times_rows(tl.load(first + (num_rows // 2 + SCALE_BLOCK - 1) // SCALE_BLOCK * stride), xs)
            factor = tl.where((row // GATE_ROWS % 2 == 0)[:, None], factor, up)
        return factor
    else:
        row = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        ws = tl.load(w_scale + row // SCALE_BLOCK * stride, mask=row < num_rows, other=0.0)[:, None]
        if xs is not None:
            ws = ws * xs[None, :]
        return ws


@triton.jit
def _times_rows(scale, xs):
    """A number times xs [BLOCK_M], [1, BLOCK_M]; [1, 1] without xs."""
    if xs is not None:
        return (scale * xs)[None, :]
    else:
        return tl.full([1, 1], 1.0, tl.float32) * scale


@triton.jit
def _load(place, in_rows, column, columns_left, EVEN_ROWS: tl.constexpr, EVEN_K: tl.constexpr):
    """A block of an operand, zero outside of it."""
    if EVEN_ROWS and EVEN_K:
        return tl.load(place)
    elif EVEN_ROWS:
        return tl.load(place, mask=(column < columns_left)[None, :], other=0.0)
    elif EVEN_K:
        return tl.load(place, mask=in_rows, other=0.0)
    else:
        return tl.load(place, mask=in_rows & (column < columns_left)[None, :], other=0.0)


@triton.jit
def from_e4m3_bits(bits, dtype: tl.constexpr):
    """The bits of finite FP8 E4M3 numbers, uint8, to float16, bfloat16 or float32: exact, subnormals too.

    Sign, exponent and mantissa go where the wider type has them, and a power of two makes up for its other bias.
    """
    wide = bits.to(tl.int16)
    sign = (wide & 0x80) << 8
    if dtype == tl.bfloat16:
        return (sign | ((wide & 0x7F) << 4)).to(tl.bfloat16, bitcast=True) * 1.329227995784916e36  # 2^(127 - 7)
    else:
        return ((sign | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0).to(dtype)  # 2^(15 - 7)
