# mypy: ignore-errors
"""The inner loop of attention, shared by the split kernel and the prefill kernel: online softmax over KV tiles.

A tile is `BLOCK_N` positions of one block and one KV head: dense memory, found by one scalar load of the block table.
Rows are query tokens times the heads of a group, so that grouped heads fill the matrix instruction's rows.

Softmax as in FlashAttention (Dao et al. 2022), in base 2: a score is q.k times `rate` = scale * log2(e), the product
folded into the exponent's multiply-add. A masked weight is exactly 0, so a row's bits are the same whether a tile was
treated as full or as partly seen. The running maximum starts at a finite -1e30: no infinities to guard against.
"""

import triton
import triton.language as tl

# Storage of the KV cache (constexpr KV): the dot's own type, e4m3 as a type, e4m3 as bits in uint8, int8.
KV_PLAIN = 0
KV_FP8 = 1
KV_FP8_BITS = 2
KV_INT8 = 3


@triton.jit
def dot_type(x, KV: tl.constexpr, DOT: tl.constexpr):
    """A loaded tile in the dot's type. Of KV_FP8_BITS the value / 256, exact in fp16 down to e4m3's subnormals."""
    if KV == 2:
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True).to(DOT)
    else:
        return x.to(DOT)


@triton.jit
def load_tile(
    base,
    is_kept,
    STEP_N: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BLOCK_N, WIDTH] from column OFFSET of a tile whose rows are STEP_N apart, or its transpose."""
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, WIDTH) + OFFSET
    if TRANSPOSED:
        where = n[None, :] * STEP_N + d[:, None]
        if MASKED:
            return tl.load(base + where, mask=is_kept[None, :], other=0.0)
        else:
            return tl.load(base + where)
    else:
        where = n[:, None] * STEP_N + d[None, :]
        if MASKED:
            return tl.load(base + where, mask=is_kept[:, None], other=0.0)
        else:
            return tl.load(base + where)


@triton.jit
def step(
    tile,
    q0,
    q1,
    keys,
    values,
    table,
    block_step_k,
    block_step_v,
    peak,
    total,
    acc0,
    acc1,
    row_pos,
    kv_begin,
    kv_end,
    window,
    rate,
    cap,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV: tl.constexpr,
    DOT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile: scores, new maximum, weights, accumulators. MASKED where some row does not see all of the tile."""
    DIM: tl.constexpr = D0 + D1
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    block = tl.load(table + tile // TILES).to(tl.int64)
    k_base = keys + block * block_step_k + (tile % TILES) * (BLOCK_N * DIM)
    v_base = values + block * block_step_v + (tile % TILES) * (BLOCK_N * DIM)
    pos = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_kept = pos < kv_end
    if WINDOW:
        is_kept = is_kept & (pos >= kv_begin)
    k0 = load_tile(k_base, is_kept, DIM, 0, D0, BLOCK_N, True, MASKED)
    s = tl.dot(q0, dot_type(k0, KV, DOT), input_precision="ieee")
    if D1 > 0:
        k1 = load_tile(k_base, is_kept, DIM, D0, D1, BLOCK_N, True, MASKED)
        s = tl.dot(q1, dot_type(k1, KV, DOT), s, input_precision="ieee")
    if SOFT_CAP:
        # cap * tanh(x / cap) by 1 - 2 / (1 + e^(2x / cap)); `rate` and `cap` hold the factors, see `soft_cap_factors`.
        s = cap - (2.0 * cap) / (1.0 + tl.math.exp2(s * rate))
    if MASKED:
        is_seen = pos[None, :] <= row_pos[:, None]
        if WINDOW:
            is_seen = is_seen & (pos[None, :] > row_pos[:, None] - window)
        s = tl.where(is_seen, s, -1.0e30)
    if SOFT_CAP:
        m_new = tl.maximum(peak, tl.max(s, 1))
        p = tl.math.exp2(s - m_new[:, None])
    else:
        m_new = tl.maximum(peak, tl.max(s, 1) * rate)
        p = tl.math.exp2(tl.fma(s, rate, -m_new[:, None]))
    if MASKED:
        p = tl.where(is_seen, p, 0.0)
    alpha = tl.math.exp2(peak - m_new)
    total = total * alpha + tl.sum(p, 1)
    p = p.to(DOT)
    v0 = load_tile(v_base, is_kept, DIM, 0, D0, BLOCK_N, False, MASKED)
    acc0 = tl.dot(p, dot_type(v0, KV, DOT), acc0 * alpha[:, None], input_precision="ieee")
    if D1 > 0:
        v1 = load_tile(v_base, is_kept, DIM, D0, D1, BLOCK_N, False, MASKED)
        acc1 = tl.dot(p, dot_type(v1, KV, DOT), acc1 * alpha[:, None], input_precision="ieee")
    return m_new, total, acc0, acc1


@triton.jit
def attend(
    lo,
    hi,
    first_pos,
    last_pos,
    q0,
    q1,
    keys,
    values,
    table,
    block_step_k,
    block_step_v,
    row_pos,
    window,
    rate,
    cap,
    BLOCK_M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV: tl.constexpr,
    DOT: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows at positions first_pos .. last_pos over tiles lo .. hi - 1: (maximum, sum, accumulators), unnormalised.

    Tiles at the window's edge, then tiles that all rows see whole, then tiles at the causal edge: only the first and
    the last kind pay for masks.
    """
    peak = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, D0], tl.float32)
    acc1 = 0.0
    if D1 > 0:
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    kv_end = last_pos + 1
    kv_begin = 0
    full_lo = lo
    full_hi = tl.minimum(hi, (first_pos + 1) // BLOCK_N)
    if WINDOW:
        kv_begin = tl.maximum(first_pos - window + 1, 0)
        # The first tile that even the last row sees from its start.
        full_lo = tl.minimum(tl.maximum(lo, tl.cdiv(tl.maximum(last_pos - window + 1, 0), BLOCK_N)), hi)
        full_hi = tl.maximum(full_lo, full_hi)
        for tile in tl.range(lo, full_lo, num_stages=1):
            peak, total, acc0, acc1 = step(
                tile,
                q0,
                q1,
                keys,
                values,
                table,
                block_step_k,
                block_step_v,
                peak,
                total,
                acc0,
                acc1,
                row_pos,
                kv_begin,
                kv_end,
                window,
                rate,
                cap,
                D0,
                D1,
                BLOCK_N,
                BLOCK_SIZE,
                KV,
                DOT,
                SOFT_CAP,
                WINDOW,
                True,
            )
    for tile in tl.range(full_lo, full_hi, num_stages=STAGES):
        peak, total, acc0, acc1 = step(
            tile,
            q0,
            q1,
            keys,
            values,
            table,
            block_step_k,
            block_step_v,
            peak,
            total,
            acc0,
            acc1,
            row_pos,
            kv_begin,
            kv_end,
            window,
            rate,
            cap,
            D0,
            D1,
            BLOCK_N,
            BLOCK_SIZE,
            KV,
            DOT,
            SOFT_CAP,
            WINDOW,
            False,
        )
    for tile in tl.range(tl.maximum(full_lo, full_hi), hi, num_stages=1):
        peak, total, acc0, acc1 = step(
            tile,
            q0,
            q1,
            keys,
            values,
            table,
            block_step_k,
            block_step_v,
            peak,
            total,
            acc0,
            acc1,
            row_pos,
            kv_begin,
            kv_end,
            window,
            rate,
            cap,
            D0,
            D1,
            BLOCK_N,
            BLOCK_SIZE,
            KV,
            DOT,
            SOFT_CAP,
            WINDOW,
            True,
        )
    return peak, total, acc0, acc1


@triton.jit
def merge(peak, total, acc0, acc1, m_part, l_part, part0, part1, D1: tl.constexpr):
    """The running softmax with the next split's added: the same arithmetic wherever splits are merged."""
    m_new = tl.maximum(peak, m_part)
    old = tl.math.exp2(peak - m_new)
    new = tl.math.exp2(m_part - m_new)
    total = tl.fma(total, old, l_part * new)
    acc0 = tl.fma(acc0, old[:, None], part0 * new[:, None])
    if D1 > 0:
        acc1 = tl.fma(acc1, old[:, None], part1 * new[:, None])
    return m_new, total, acc0, acc1


@triton.jit
def store_rows(base, row_offset, is_row, x0, x1, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of head_dim elements at base + row_offset, converted to base's type."""
    kind = base.dtype.element_ty
    d0 = tl.arange(0, D0)
    tl.store(base + (row_offset[:, None] + d0[None, :]), x0.to(kind), mask=is_row[:, None])
    if D1 > 0:
        d1 = tl.arange(0, D1) + D0
        tl.store(base + (row_offset[:, None] + d1[None, :]), x1.to(kind), mask=is_row[:, None])


@triton.jit
def load_rows(base, row_offset, is_row, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    d = tl.arange(0, WIDTH) + OFFSET
    return tl.load(base + (row_offset[:, None] + d[None, :]), mask=is_row[:, None], other=0.0)
