"""Device functions that the products share: what happens to a tile of sums once K is summed, and what precedes it.

A tile is [BLOCK_N rows of the weight, BLOCK_M rows of x] float32: weights are the matrix unit's first operand, so that
few rows of x waste little of it. Whatever changes a row's bits is done in an order that no block size changes:
along K by the matrix unit, and chunks of K first to last. Called by `triton_packed.py`, `triton_direct.py` and the
persistent kernels of many rows.
"""

import triton
import triton.language as tl
from headrace.kernels.linear.layout import GATE_ROWS as _GATE_ROWS

GATE_ROWS = tl.constexpr(_GATE_ROWS)


@triton.jit
def tile_of_program(num_n, num_m, SPLITS: tl.constexpr, SPLIT_GRID: tl.constexpr, GROUP: tl.constexpr):
    """(tile of rows of the weight, tile of rows of x, chunk of K) of this program.

    Chunks of one tile are neighbours; tiles go through x in groups of GROUP tiles of weights, so that both stay in L2.
    """
    pid = tl.program_id(0)
    chunk = 0
    if SPLIT_GRID:
        chunk = pid % SPLITS
        pid = pid // SPLITS
    tile_n, tile_m = tile_at(pid, num_n, num_m, GROUP)
    return tile_n, tile_m, chunk


@triton.jit
def tile_at(index, num_n, num_m, GROUP: tl.constexpr):
    """(tile of rows of the weight, tile of rows of x) number `index`, in groups of GROUP tiles of weights."""
    group = index // (GROUP * num_m)
    first = group * GROUP
    size = tl.minimum(num_n - first, GROUP)
    inside = index - group * (GROUP * num_m)
    return first + inside % size, inside // size


@triton.jit
def add_squares(products, x):
    """products [R, R] + x @ x.T, float32, of x [R, C]: the matrix unit squares for next to nothing.

    R below 64, so that every kernel that norms a row does it with the same instruction, and so to the same bits.
    """
    return tl.dot(x, tl.trans(x), products, input_precision="ieee")


@triton.jit
def squares_of(products):
    """float32 [R]: the diagonal. What is added to it is zero, so the order does not matter."""
    row = tl.arange(0, products.shape[0])
    return tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), axis=1)


@triton.jit
def times_norm_weight(x, norm_weight, columns_left, EVEN_K: tl.constexpr):
    """x [R, C] times norm_weight [C], first rounded to x's type: one rounding product, two at a time."""
    column = tl.arange(0, x.shape[1])
    if EVEN_K:
        factor = tl.load(norm_weight + column)
    else:
        factor = tl.load(norm_weight + column, mask=column < columns_left, other=0.0)
    return x * factor.to(x.dtype)[None, :]


@triton.jit
def norm_factor(squares, K, eps):
    """1 / sqrt(mean of squares + eps) of rows of K columns."""
    return tl.rsqrt(squares / K + eps)


@triton.jit
def keep_chunk(
    acc,
    squares,
    partials,
    counters,
    tile,
    chunk,
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Store this program's sums; how many of its tile's programs had come before it.

    The barrier puts every thread's stores before the one thread's release; its acquire puts theirs before our loads.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    SIZE: tl.constexpr = (BLOCK_N + 1) * BLOCK_M
    place = partials + (tile.to(tl.int64) * SPLITS + chunk) * SIZE
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    tl.store(place + rows[:, None] * BLOCK_M + columns[None, :], acc)
    if HAS_NORM:
        tl.store(place + BLOCK_N * BLOCK_M + columns, squares)
    tl.debug_barrier()
    return tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")


@triton.jit
def add_chunks(
    acc,
    partials,
    counters,
    tile,
    SPLITS: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """The sums of all chunks, first to last, in the shape of acc; the counter is back at 0 for the next launch."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    SIZE: tl.constexpr = (BLOCK_N + 1) * BLOCK_M
    place = partials + tile.to(tl.int64) * SPLITS * SIZE
    rows, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    inside = rows[:, None] * BLOCK_M + columns[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for chunk in tl.static_range(SPLITS):
        total += tl.load(place + chunk * SIZE + inside, cache_modifier=".cg")
        if HAS_NORM:
            squares += tl.load(place + chunk * SIZE + BLOCK_N * BLOCK_M + columns, cache_modifier=".cg")
    tl.store(counters + tile, 0)
    return total, squares


@triton.jit
def activate(gate, up, ACTIVATION: tl.constexpr):
    """SiLU(gate) * up, or the tanh form of GELU: (1 + tanh(u)) / 2 = 1 / (1 + exp(-2u))."""
    if ACTIVATION == "silu":
        u = gate
    else:
        u = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)  # 2 * sqrt(2 / pi)
    return gate / (1.0 + tl.exp(-u)) * up


@triton.jit
def scale_rows(acc, squares, x_scale, first_m, M, K, eps, HAS_NORM: tl.constexpr):
    """A tile's sums times the scale of each row of x, and divided by its root mean square.

    squares: float32 [BLOCK_M], of rows to norm. x_scale: float32 [M] or None.
    """
    if x_scale is not None:
        m = first_m + tl.arange(0, acc.shape[1])
        acc = acc * tl.load(x_scale + m, mask=m < M, other=0.0)[None, :]
    if HAS_NORM:
        acc = acc * norm_factor(squares, K, eps)[None, :]
    return acc


@triton.jit
def add_bias(acc, bias, first_row, num_rows, out_features, IS_GATED: tl.constexpr):
    """bias: [out_features], or gated [2 * out_features] (gate, then up), or None. num_rows: of the packed weight."""
    if bias is not None:
        row = first_row + tl.arange(0, acc.shape[0])
        entry, mask = row, row < num_rows
        if IS_GATED:
            inside = row // (2 * GATE_ROWS) * GATE_ROWS + row % GATE_ROWS
            entry, mask = inside + row // GATE_ROWS % 2 * out_features, mask & (inside < out_features)
        acc += tl.load(bias + entry, mask=mask, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def finish_tile(
    acc,
    squares,
    x_scale,
    out,
    residual,
    bias,
    first_row,
    first_m,
    M,
    K,
    num_rows,
    out_features,
    stride_out,
    stride_residual,
    eps,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
):
    """Scale rows of x, add the bias, act, add the residual, and store [BLOCK_M, BLOCK_N (/ 2 if gated)]."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    acc = scale_rows(acc, squares, x_scale, first_m, M, K, eps, HAS_NORM)
    acc = add_bias(acc, bias, first_row, num_rows, out_features, ACTIVATION is not None)
    if ACTIVATION is None:
        column = first_row + tl.arange(0, BLOCK_N)
    else:
        halves = tl.reshape(acc, (BLOCK_N // (2 * GATE_ROWS), 2, GATE_ROWS, BLOCK_M))
        gate, up = tl.split(tl.permute(halves, (0, 2, 3, 1)))
        acc = tl.reshape(activate(gate, up, ACTIVATION), (BLOCK_N // 2, BLOCK_M))
        column = first_row // 2 + tl.arange(0, BLOCK_N // 2)
    m = first_m + tl.arange(0, BLOCK_M)
    mask = (column < out_features)[:, None] & (m < M)[None, :]
    m = m.to(tl.int64)
    if residual is not None:
        place = residual + m[None, :] * stride_residual + column[:, None]
        acc += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + m[None, :] * stride_out + column[:, None], acc.to(out.dtype.element_ty), mask=mask)
