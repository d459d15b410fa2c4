"""Norm for many rows: x times the norm's weight, and each row's factor, once instead of in every program.

Gives the bits of the prologue in `triton_packed.py` and `triton_direct.py`: squares are summed block by block and chunk
by chunk as there, whatever the width of a block. Called by `triton.py`.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.triton_tile import add_squares, norm_factor, squares_of, times_norm_weight


@triton.jit
def norm_rows_kernel(
    x,
    norm_weight,
    out,
    factors,
    M,
    K,
    num_steps,
    steps_per_chunk,
    stride_x,
    eps,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """out [M, K] = x * norm_weight, dense; factors float32 [M]. WIDTH: columns that the products square at once."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    in_m = (m < M)[:, None]
    total = tl.zeros([ROWS], tl.float32)
    products = tl.zeros([ROWS, ROWS], tl.float32)
    for step in tl.range(0, num_steps):
        offset = step * WIDTH
        mask = in_m if EVEN_K else in_m & (column < K - offset)[None, :]
        a = tl.load(x + (m.to(tl.int64) * stride_x)[:, None] + (offset + column)[None, :], mask=mask, other=0.0)
        products = add_squares(products, a)
        a = times_norm_weight(a, norm_weight + offset, K - offset, EVEN_K)
        tl.store(out + (m.to(tl.int64) * K)[:, None] + (offset + column)[None, :], a, mask=mask)
        if (step + 1) % steps_per_chunk == 0 or step == num_steps - 1:
            total += squares_of(products)
            products = tl.zeros([ROWS, ROWS], tl.float32)
    tl.store(factors + m, norm_factor(total, K, eps), mask=m < M)
