# mypy: ignore-errors
"""The inner loop of attention, shared by the split kernel and the prefill kernel: online softmax over KV tiles.

A tile is `BLOCK_N` positions of one block and one KV head: dense memory, found by one scalar load of the block table,
which is done a tile ahead so that the loads of keys and values need not wait for it. Rows are query tokens times the
heads of a group, so that grouped heads fill the matrix instruction's rows.

Softmax as in FlashAttention (Dao et al. 2022), in base 2: a score is q.k times `rate` = scale * log2(e), the product
folded into the exponent's multiply-add. A masked weight is exactly 0, so a row's bits are the same whether a tile was
treated as full or as partly seen. The running maximum starts at a finite -1e30: no infinities to guard against.

A head_dim that is no power of two (80, 96) is D0 + D1: each part has its own loads and products, nothing is padded.
"""

import triton
import triton.language as tl

# Storage of the KV cache: the dot's own type, e4m3 as a type, e4m3 as bits in uint8, int8.
KV_PLAIN = tl.constexpr(0)
KV_FP8 = tl.constexpr(1)
KV_FP8_BITS = tl.constexpr(2)
KV_INT8 = tl.constexpr(3)

LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def dot_type(x, KV: tl.constexpr, DOT: tl.constexpr):
    """A loaded tile in the dot's type. Of KV_FP8_BITS the value / 256, exact in fp16 down to e4m3's subnormals."""
    if KV == KV_FP8_BITS:
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(DOT)
    else:
        return x.to(DOT)


@triton.jit
def load_scales(rate, k_scale_ptr, v_scale_ptr, kv_head, KV: tl.constexpr, HAS_SCALES: tl.constexpr):
    """(rate, v_scale) with the scales of a KV head: of keys in the scores, of values in the result."""
    v_scale = 1.0
    if HAS_SCALES:
        rate *= tl.load(k_scale_ptr + kv_head)
        v_scale *= tl.load(v_scale_ptr + kv_head)
    if KV == KV_FP8_BITS:
        rate *= 256.0  # see dot_type
        v_scale *= 256.0
    return rate, v_scale


@triton.jit
def load_tile(base, is_kept, OFFSET: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, DIM: tl.constexpr,
              TRANSPOSED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Columns OFFSET .. OFFSET + WIDTH of a [BLOCK_N, DIM] tile, or their transpose; 0 where not kept."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH) + OFFSET
    if TRANSPOSED:
        where = n[None, :] * DIM + d[:, None]
        is_kept = is_kept[None, :]
    else:
        where = n[:, None] * DIM + d[None, :]
        is_kept = is_kept[:, None]
    if MASKED:
        return tl.load(base + where, mask=is_kept, other=0.0)
    else:
        return tl.load(base + where)


@triton.jit
def step(tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end, window,
         rate, cap, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
         KV: tl.constexpr, DOT: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
         WIDE_SUM: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile: scores, maximum, weights, accumulators. MASKED where some row does not see all of the tile."""
    DIM: tl.constexpr = D0 + D1
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    k_tile = keys + block.to(tl.int64) * k_step + tile % TILES * (BLOCK_N * DIM)
    v_tile = values + block.to(tl.int64) * v_step + tile % TILES * (BLOCK_N * DIM)
    pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_kept = pos < kv_end
    if WINDOW:
        is_kept = is_kept & (pos >= kv_begin)
    k0 = load_tile(k_tile, is_kept, 0, D0, BLOCK_N, DIM, True, False)
    s = tl.dot(q0, dot_type(k0, KV, DOT), input_precision="ieee")
    if D1 > 0:
        k1 = load_tile(k_tile, is_kept, D0, D1, BLOCK_N, DIM, True, False)
        s = tl.dot(q1, dot_type(k1, KV, DOT), s, input_precision="ieee")
    if SOFT_CAP:
        # cap * tanh(x / cap) by 1 - 2 / (1 + e^(2x / cap)); triton.soft_cap_factors gives `rate` and `cap`.
        s = cap - (2.0 * cap) / (1.0 + tl.math.exp2(s * rate))
    if MASKED:
        is_seen = pos[None, :] <= row_pos[:, None]
        if WINDOW:
            is_seen = is_seen & (pos[None, :] > row_pos[:, None] - window)
        s = tl.where(is_seen, s, LOWEST)
    if SOFT_CAP:
        top = tl.maximum(peak, tl.max(s, 1))
        p = tl.math.exp2(s - top[:, None])
    else:
        top = tl.maximum(peak, tl.max(s, 1) * rate)
        p = tl.math.exp2(tl.fma(s, rate, -top[:, None]))
    if MASKED:
        p = tl.where(is_seen, p, 0.0)
    alpha = tl.math.exp2(peak - top)
    if WIDE_SUM:
        total = tl.fma(total, alpha[:, None], p)
    else:
        total = tl.fma(total, alpha, tl.sum(p, 1))
    p = p.to(DOT)
    v0 = load_tile(v_tile, is_kept, 0, D0, BLOCK_N, DIM, False, MASKED)
    acc0 = tl.dot(p, dot_type(v0, KV, DOT), acc0 * alpha[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = load_tile(v_tile, is_kept, D0, D1, BLOCK_N, DIM, False, MASKED)
        acc1 = tl.dot(p, dot_type(v1, KV, DOT), acc1 * alpha[:, None], input_precision="ieee")
    return top, total, acc0, acc1


@triton.jit
def attend(lo, hi, first_pos, last_pos, q0, q1, keys, values, table, k_step, v_step, row_pos, window, rate, cap,
           BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, KV: tl.constexpr, DOT: tl.constexpr, SOFT_CAP: tl.constexpr,
           WINDOW: tl.constexpr, WIDE_SUM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Rows at positions first_pos .. last_pos over tiles lo .. hi - 1: (maximum, sum, accumulators), unnormalised.

    Tiles at the window's edge, then tiles that all rows see whole, then tiles at the causal edge: only the first and
    the last kind pay for masks. WIDE_SUM keeps sums of weights per column until the end, which spares the loop a
    reduction over warps where warps share a row (few rows).
    """
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    if WIDE_SUM:
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    else:
        total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = 0.0
    if D1 > 0:
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    kv_end = last_pos + 1
    kv_begin = 0
    full_lo = lo
    if WINDOW:
        kv_begin = tl.maximum(first_pos - window + 1, 0)
        # The first tile that even the last row sees from its start.
        full_lo = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(last_pos - window + 1, 0), BLOCK_N)), hi)
        for tile in tl.range(lo, full_lo, num_stages=2):
            block = tl.load(table + tile // TILES)
            peak, total, acc0, acc1 = step(
                tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end,
                window, rate, cap, D0, D1, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP, WINDOW, WIDE_SUM, True,
            )  # fmt: skip
    full_hi = tl.maximum(tl.minimum(hi, kv_full(first_pos, BLOCK_N)), full_lo)
    block = tl.load(table + tl.minimum(full_lo, hi - 1) // TILES)
    for tile in tl.range(full_lo, full_hi, num_stages=STAGES):
        next_block = tl.load(table + tl.minimum(tile + 1, hi - 1) // TILES)
        peak, total, acc0, acc1 = step(
            tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end,
            window, rate, cap, D0, D1, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP, WINDOW, WIDE_SUM, False,
        )  # fmt: skip
        block = next_block
    for tile in tl.range(full_hi, hi, num_stages=2):
        block = tl.load(table + tile // TILES)
        peak, total, acc0, acc1 = step(
            tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end,
            window, rate, cap, D0, D1, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP, WINDOW, WIDE_SUM, True,
        )  # fmt: skip
    if WIDE_SUM:
        return peak, tl.sum(total, 1), acc0, acc1
    else:
        return peak, total, acc0, acc1


@triton.jit
def kv_full(first_pos, BLOCK_N: tl.constexpr):
    """Tiles that a query at first_pos, and so every later one, sees up to their end."""
    return (first_pos + 1) // BLOCK_N


@triton.jit
def store_rows(base, row_offset, is_row, x0, x1, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of head_dim elements at base + row_offset, converted to base's type."""
    kind: tl.constexpr = base.dtype.element_ty
    d0 = tl.arange(0, D0)
    tl.store(base + (row_offset[:, None] + d0[None, :]), x0.to(kind), mask=is_row[:, None])
    if D1 > 0:
        d1 = tl.arange(0, D1) + D0
        tl.store(base + (row_offset[:, None] + d1[None, :]), x1.to(kind), mask=is_row[:, None])


@triton.jit
def load_rows(base, row_offset, is_row, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, WIDTH] from column OFFSET on; 0 where no row is."""
    d = tl.arange(0, WIDTH) + OFFSET
    return tl.load(base + (row_offset[:, None] + d[None, :]), mask=is_row[:, None], other=0.0)


@triton.jit
def first_split(pos, window, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """Split of the first position that a query at `pos` sees."""
    if WINDOW:
        return tl.maximum(pos - window + 1, 0) // SPLIT
    else:
        return 0
