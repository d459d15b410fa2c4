"""The product of many rows whose operands go to the matrix unit as they lie. Launched by `triton_persistent.py`.

One program per SM takes tiles one after the other, in the order of `triton_tile.tile_at`, so that what is in flight at
a time shares weights and rows in L2. The sums are those of `triton_direct.py`, block by block and chunk by chunk: a row
has the bits that it has among few rows.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_direct import sum_blocks
from headrace.kernels.linear.triton_finish import finish
from headrace.kernels.linear.triton_tile import tile_at


@triton.jit
def persistent_direct_kernel(
    x,
    weight,
    out,
    bias,
    residual,
    heads,
    x_scale,
    w_scale,
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
    IS_BLOCK_SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GROUP_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_TMA: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HEAD_FLAGS: tl.constexpr,
    HEAD_BLOCK_SIZE: tl.constexpr,
):
    """As `triton_direct.direct_kernel`, without a norm and without chunks of K as programs of their own.

    HAS_TMA: x and weight are tensor descriptors; else pointers, the twin that checkers and older GPUs run.
    """
    IS_GATED: tl.constexpr = ACTIVATION is not None
    per_chunk = (num_blocks + SPLITS - 1) // SPLITS
    for index in tl.range(tl.program_id(0), num_n * num_m, tl.num_programs(0)):
        tile_n, tile_m = tile_at(index, num_n, num_m, GROUP_N)
        if SPLITS == 1:
            total, _ = sum_blocks(
                x, weight, None, x_scale, w_scale, tile_n, tile_m, M, num_rows, K,
                stride_x, stride_w, stride_x_scale, stride_x_scale_k, stride_w_scale, 0, num_blocks,
                IS_BLOCK_SCALED, IS_GATED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, HAS_TMA,
            )  # fmt: skip
        else:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.range(0, SPLITS):
                acc, _ = sum_blocks(
                    x, weight, None, x_scale, w_scale, tile_n, tile_m, M, num_rows, K,
                    stride_x, stride_w, stride_x_scale, stride_x_scale_k, stride_w_scale,
                    part * per_chunk, tl.minimum(part * per_chunk + per_chunk, num_blocks),
                    IS_BLOCK_SCALED, IS_GATED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, EVEN_N, HAS_TMA,
                )  # fmt: skip
                total += acc
        finish(
            total, None, None if IS_BLOCK_SCALED else x_scale, None if IS_BLOCK_SCALED else w_scale, out, residual,
            bias, heads, None, None, tile_n, tile_m, num_m, 0, M, K, num_rows, out_features,
            stride_out, stride_residual, 0.0, SPLITS, False, False, ACTIVATION, HEAD_FLAGS, HEAD_BLOCK_SIZE,
        )  # fmt: skip
