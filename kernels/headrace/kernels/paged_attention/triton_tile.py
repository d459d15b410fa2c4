"""The inner loop of attention, shared by the split kernel and the prefill kernel: online softmax over KV tiles.

A tile is `BLOCK_N` positions of one block and one KV head: dense memory, found by one scalar load of the block table,
which is done a tile ahead so that the loads of keys and values need not wait for it. Rows are query tokens times the
heads of a group, so that grouped heads fill the matrix instruction's rows.

Softmax as in FlashAttention (Dao et al. 2022), in base 2: a score is q.k times `rate` = scale * log2(e), the product
folded into the exponent's multiply-add. A masked weight is exactly 0, so a row's bits are the same whether a tile was
treated as full or as partly seen. The running maximum starts at a finite -1e30: no infinities to guard against.

A tile has up to two parts, each with products of its own. A head_dim that is no power of two (80, 96) is one of 64
and the rest. A cache of bytes (KV other than KV_PLAIN, then passed as int16) has its even and its odd columns.
"""

import triton
import triton.language as tl
from headrace.kernels.paged_attention.triton_unpack import FP8_FACTOR, KV_FP8, KV_PLAIN, column

LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def load_scales(rate, k_scale_ptr, v_scale_ptr, kv_head, KV: tl.constexpr, HAS_SCALES: tl.constexpr):
    """(rate, v_scale) with the scales of a KV head: of keys in the scores, of values in the result."""
    v_scale = 1.0
    if HAS_SCALES:
        rate *= tl.load(k_scale_ptr + kv_head)
        v_scale *= tl.load(v_scale_ptr + kv_head)
    if KV == KV_FP8:
        rate *= FP8_FACTOR
        v_scale *= FP8_FACTOR
    return rate, v_scale


@triton.jit
def load_columns(base, is_kept, BEGIN: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
                 TRANSPOSED: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Columns BEGIN .. BEGIN + WIDTH of a dense [BLOCK_N, DIM] tile, or their transpose; 0 past DIM and not kept."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH) + BEGIN
    if TRANSPOSED:
        where = n[None, :] * DIM + d[:, None]
        is_inside = (d < DIM)[:, None]
        is_kept = is_kept[None, :]
    else:
        where = n[:, None] * DIM + d[None, :]
        is_inside = (d < DIM)[None, :]
        is_kept = is_kept[:, None]
    if MASKED and BEGIN + WIDTH > DIM:
        return tl.load(base + where, mask=is_kept & is_inside, other=0)
    elif MASKED:
        return tl.load(base + where, mask=is_kept, other=0)
    elif BEGIN + WIDTH > DIM:
        return tl.load(base + where, mask=is_inside, other=0)
    else:
        return tl.load(base + where)


@triton.jit
def load_parts(base, is_kept, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
               KV: tl.constexpr, DOT: tl.constexpr, INLINE_ASM: tl.constexpr, TRANSPOSED: tl.constexpr,
               MASKED: tl.constexpr):  # fmt: skip
    """The two parts of a tile in the dot's type, [BLOCK_N, W0] and [BLOCK_N, W1] or their transposes."""
    if KV == KV_PLAIN:
        x0 = load_columns(base, is_kept, 0, W0, DIM, BLOCK_N, TRANSPOSED, MASKED)
        x1 = x0
        if W1 > 0:
            x1 = load_columns(base, is_kept, W0, W1, DIM, BLOCK_N, TRANSPOSED, MASKED)
        return x0, x1
    else:
        words = load_columns(base, is_kept, 0, W0, DIM // 2, BLOCK_N, TRANSPOSED, MASKED)
        return column(words, False, KV, DOT, INLINE_ASM), column(words, True, KV, DOT, INLINE_ASM)


@triton.jit
def step(tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end, window,
         rate, cap, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
         BLOCK_SIZE: tl.constexpr, KV: tl.constexpr, DOT: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
         INLINE_ASM: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """One tile: scores, maximum, weights, accumulators. MASKED where some row does not see all of the tile.

    Slots that no row sees are not masked among keys, whose scores are, but among values: their weight is 0, and 0 times
    NaN is NaN.
    """
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    STEP: tl.constexpr = BLOCK_N * DIM if KV == KV_PLAIN else BLOCK_N * DIM // 2
    pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_kept = pos < kv_end
    if WINDOW:
        is_kept = is_kept & (pos >= kv_begin)
    k_tile = keys + block.to(tl.int64) * k_step + tile % TILES * STEP
    k0, k1 = load_parts(k_tile, is_kept, W0, W1, DIM, BLOCK_N, KV, DOT, INLINE_ASM, True, False)
    s = tl.dot(q0, k0, input_precision="ieee")
    if W1 > 0:
        s = tl.dot(q1, k1, s, input_precision="ieee")
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
    total = tl.fma(total, alpha, tl.sum(p, 1))
    p = p.to(DOT)
    v_tile = values + block.to(tl.int64) * v_step + tile % TILES * STEP
    v0, v1 = load_parts(v_tile, is_kept, W0, W1, DIM, BLOCK_N, KV, DOT, INLINE_ASM, False, MASKED)
    acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision="ieee")
    if W1 > 0:
        acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision="ieee")
    return top, total, acc0, acc1


@triton.jit
def attend(lo, hi, first_pos, last_pos, q0, q1, keys, values, table, k_step, v_step, row_pos, window, rate, cap,
           BLOCK_M: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_SIZE: tl.constexpr, KV: tl.constexpr, DOT: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
           INLINE_ASM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Rows at positions first_pos .. last_pos over tiles lo .. hi - 1: (maximum, sum, accumulators), unnormalised.

    Tiles at the window's edge, then tiles that all rows see whole, then tiles at the causal edge: only the first and
    the last kind pay for masks.
    """
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, W0], tl.float32)
    acc1 = 0.0
    if W1 > 0:
        acc1 = tl.zeros([BLOCK_M, W1], tl.float32)
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
                window, rate, cap, W0, W1, DIM, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP, WINDOW, INLINE_ASM, True,
            )  # fmt: skip
    full_hi = tl.maximum(tl.minimum(hi, kv_full(first_pos, BLOCK_N)), full_lo)
    block = tl.load(table + tl.minimum(full_lo, hi - 1) // TILES)
    for tile in tl.range(full_lo, full_hi, num_stages=STAGES):
        next_block = tl.load(table + tl.minimum(tile + 1, hi - 1) // TILES)
        peak, total, acc0, acc1 = step(
            tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end,
            window, rate, cap, W0, W1, DIM, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP, WINDOW, INLINE_ASM, False,
        )  # fmt: skip
        block = next_block
    for tile in tl.range(full_hi, hi, num_stages=2):
        block = tl.load(table + tile // TILES)
        peak, total, acc0, acc1 = step(
            tile, block, q0, q1, keys, values, k_step, v_step, peak, total, acc0, acc1, row_pos, kv_begin, kv_end,
            window, rate, cap, W0, W1, DIM, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP, WINDOW, INLINE_ASM, True,
        )  # fmt: skip
    return peak, total, acc0, acc1


@triton.jit
def merge(peak, total, acc0, acc1, part_peak, part_total, part0, part1, W1: tl.constexpr):
    """Results of the positions so far and of those of the next split, as `attend` gives them, made one."""
    top = tl.maximum(peak, part_peak)
    old = tl.math.exp2(peak - top)
    new = tl.math.exp2(part_peak - top)
    total = tl.fma(total, old, part_total * new)
    acc0 = tl.fma(acc0, old[:, None], part0 * new[:, None])
    if W1 > 0:
        acc1 = tl.fma(acc1, old[:, None], part1 * new[:, None])
    return top, total, acc0, acc1


@triton.jit
def kv_full(first_pos, BLOCK_N: tl.constexpr):
    """Tiles that a query at first_pos, and so every later one, sees up to their end."""
    return (first_pos + 1) // BLOCK_N


@triton.jit
def load_query(base, row_offset, is_row, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr, KV: tl.constexpr,
               DOT: tl.constexpr):  # fmt: skip
    """The parts of query rows, [rows, W0] and [rows, W1], that meet the parts of a tile of keys."""
    if KV == KV_PLAIN:
        q0 = load_rows(base, row_offset, is_row, 0, W0, DIM).to(DOT)
        q1 = q0
        if W1 > 0:
            q1 = load_rows(base, row_offset, is_row, W0, W1, DIM).to(DOT)
        return q0, q1
    else:
        q = load_rows(base, row_offset, is_row, 0, 2 * W0, DIM).to(DOT)
        return tl.split(tl.reshape(q, (q.shape[0], W0, 2)))


@triton.jit
def store_result(base, row_offset, is_row, x0, x1, W0: tl.constexpr, W1: tl.constexpr, DIM: tl.constexpr,
                 KV: tl.constexpr):  # fmt: skip
    """Rows from the parts of the accumulator, converted to base's type."""
    if KV == KV_PLAIN:
        store_rows(base, row_offset, is_row, x0, 0, W0, DIM)
        if W1 > 0:
            store_rows(base, row_offset, is_row, x1, W0, W1, DIM)
    else:
        store_rows(base, row_offset, is_row, tl.interleave(x0, x1), 0, 2 * W0, DIM)


@triton.jit
def load_rows(base, row_offset, is_row, BEGIN: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """Columns BEGIN .. BEGIN + WIDTH of rows of DIM elements at base + row_offset; 0 past DIM and where no row is."""
    d = tl.arange(0, WIDTH) + BEGIN
    mask = is_row[:, None]
    if BEGIN + WIDTH > DIM:
        mask = mask & (d < DIM)[None, :]
    return tl.load(base + (row_offset[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(base, row_offset, is_row, x, BEGIN: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr):
    """The inverse of load_rows."""
    d = tl.arange(0, WIDTH) + BEGIN
    mask = is_row[:, None]
    if BEGIN + WIDTH > DIM:
        mask = mask & (d < DIM)[None, :]
    tl.store(base + (row_offset[:, None] + d[None, :]), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def first_split(pos, window, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """Split of the first position that a query at `pos` sees."""
    if WINDOW:
        return tl.maximum(pos - window + 1, 0) // SPLIT
    else:
        return 0
