# mypy: ignore-errors
"""Attention of sequences with few query rows: KV in splits of fixed size, and the reduction that merges them.

Called by triton.py. A split is a range of positions that starts at a multiple of SPLIT, whatever the batch: partial
results, and the order in which they are merged, depend on the sequence alone.
"""

import triton
import triton.language as tl
from headrace.kernels.paged_attention.triton_tile import attend, load_rows, merge, store_rows


@triton.jit
def first_split(pos, window, SPLIT: tl.constexpr, WINDOW: tl.constexpr):
    """Split of the first position that a query at `pos` sees."""
    if WINDOW:
        return tl.maximum(pos - window + 1, 0) // SPLIT
    else:
        return 0


@triton.jit
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    tables_ptr,
    k_scale_ptr,
    v_scale_ptr,
    rate,
    cap,
    window,
    q_step_t,
    q_step_h,
    k_step_b,
    k_step_h,
    v_step_b,
    v_step_h,
    out_step_t,
    out_step_h,
    table_step,
    rows_per_seq,
    num_heads,
    num_splits,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    KV: tl.constexpr,
    DOT: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (num_seqs, num_kv_heads, Z): program z takes items z, z + Z, ... of its sequence and KV head.

    An item is a block of BLOCK_M // GROUP query tokens and one split. partial: float32 [num_seqs * rows_per_seq,
    num_heads, num_splits, head_dim], stats: [.., 2] maximum (base 2) and sum. A sequence within one split writes `out`.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_begin = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - row_begin
    seq_len = tl.load(seq_lens_ptr + seq)
    if q_len > MAX_QUERIES or seq_len < q_len:
        return
    context = seq_len - q_len
    split_lo = first_split(context, window, SPLIT, WINDOW)
    seq_splits = tl.cdiv(seq_len, SPLIT) - split_lo
    table = tables_ptr + seq.to(tl.int64) * table_step
    keys = k_ptr + kv_head * k_step_h
    values = v_ptr + kv_head * v_step_h
    v_scale = 1.0
    if HAS_SCALES:
        rate *= tl.load(k_scale_ptr + kv_head)
        v_scale = tl.load(v_scale_ptr + kv_head)
    if KV == 2:
        rate *= 256.0
        v_scale *= 256.0
    rows = tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + rows % GROUP
    for item in range(tl.program_id(2), tl.cdiv(q_len, BLOCK_Q) * seq_splits, tl.num_programs(2)):
        token_lo = item // seq_splits * BLOCK_Q
        split = split_lo + item % seq_splits
        token = token_lo + rows // GROUP
        token_hi = tl.minimum(token_lo + BLOCK_Q, q_len)
        is_row = token < token_hi
        first_pos = context + token_lo
        last_pos = context + token_hi - 1
        lo = split * (SPLIT // BLOCK_N)
        hi = tl.minimum(lo + SPLIT // BLOCK_N, tl.cdiv(last_pos + 1, BLOCK_N))
        if WINDOW:
            lo = tl.maximum(lo, tl.maximum(first_pos - window + 1, 0) // BLOCK_N)
        if lo < hi:
            q_offset = (row_begin + token) * q_step_t + head * q_step_h
            q0 = load_rows(q_ptr, q_offset, is_row, 0, D0).to(DOT)
            q1 = q0
            if D1 > 0:
                q1 = load_rows(q_ptr, q_offset, is_row, D0, D1).to(DOT)
            peak, total, acc0, acc1 = attend(
                lo,
                hi,
                first_pos,
                last_pos,
                q0,
                q1,
                keys,
                values,
                table,
                k_step_b,
                v_step_b,
                context + token,
                window,
                rate,
                cap,
                BLOCK_M,
                D0,
                D1,
                BLOCK_N,
                BLOCK_SIZE,
                KV,
                DOT,
                SOFT_CAP,
                WINDOW,
                STAGES,
            )
            if seq_splits == 1:
                factor = (v_scale / tl.where(total > 0.0, total, 1.0))[:, None]
                out_offset = (row_begin + token) * out_step_t + head * out_step_h
                store_rows(out_ptr, out_offset, is_row, acc0 * factor, acc1 * factor, D0, D1)
            else:
                where = ((seq.to(tl.int64) * rows_per_seq + token) * num_heads + head) * num_splits + split - split_lo
                store_rows(partial_ptr, where * (D0 + D1), is_row, acc0, acc1, D0, D1)
                tl.store(stats_ptr + where * 2, peak, mask=is_row)
                tl.store(stats_ptr + where * 2 + 1, total, mask=is_row)


@triton.jit
def reduce_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    cu_seqlens_ptr,
    seq_lens_ptr,
    v_scale_ptr,
    window,
    out_step_t,
    out_step_h,
    rows_per_seq,
    num_heads,
    num_splits,
    GROUP: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    SPLIT: tl.constexpr,
    MAX_QUERIES: tl.constexpr,
    KV: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    WINDOW: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (num_seqs, num_heads, Z): program z merges the splits of query tokens z, z + Z, ... of one head.

    Reads the splits that hold a position its token sees, in the order of positions, and no other.
    """
    seq = tl.program_id(0)
    head = tl.program_id(1)
    row_begin = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - row_begin
    seq_len = tl.load(seq_lens_ptr + seq)
    context = seq_len - q_len
    if q_len > MAX_QUERIES or context < 0:
        return
    split_lo = first_split(context, window, SPLIT, WINDOW)
    if tl.cdiv(seq_len, SPLIT) - split_lo == 1:
        return
    v_scale = 1.0
    if HAS_SCALES:
        v_scale = tl.load(v_scale_ptr + head // GROUP)
    if KV == 2:
        v_scale *= 256.0
    one = tl.arange(0, 1)
    is_row = one == 0
    for token in range(tl.program_id(2), q_len, tl.num_programs(2)):
        pos = context + token
        begin = first_split(pos, window, SPLIT, WINDOW) - split_lo
        end = pos // SPLIT + 1 - split_lo
        row = ((seq.to(tl.int64) * rows_per_seq + token) * num_heads + head) * num_splits
        peak = tl.full([1], -1.0e30, tl.float32)
        total = tl.zeros([1], tl.float32)
        acc0 = tl.zeros([1, D0], tl.float32)
        acc1 = 0.0
        if D1 > 0:
            acc1 = tl.zeros([1, D1], tl.float32)
        for split in tl.range(begin, end, num_stages=STAGES):
            where = row + split + one
            m_part = tl.load(stats_ptr + where * 2)
            l_part = tl.load(stats_ptr + where * 2 + 1)
            part0 = load_rows(partial_ptr, where * (D0 + D1), is_row, 0, D0)
            part1 = 0.0
            if D1 > 0:
                part1 = load_rows(partial_ptr, where * (D0 + D1), is_row, D0, D1)
            peak, total, acc0, acc1 = merge(peak, total, acc0, acc1, m_part, l_part, part0, part1, D1)
        factor = (v_scale / total)[:, None]
        out_offset = (row_begin + token) * out_step_t + head * out_step_h + one
        store_rows(out_ptr, out_offset, is_row, acc0 * factor, acc1 * factor, D0, D1)
