"""Attention of sequences with few query rows: KV in splits of fixed size, and the reduction that merges them.

Called by triton.py. A split is a range of positions that starts at a multiple of SPLIT, whatever the batch: partial
results, and the order in which they are merged, depend on the sequence alone.
"""

import triton
import triton.language as tl
from headrace.kernels.paged_attention.triton_tile import (
    LOWEST,
    attend,
    first_split,
    load_query,
    load_rows,
    load_scales,
    merge,
    store_result,
    store_rows,
)


@triton.jit
def split_kernel(q_ptr, k_ptr, v_ptr, out_ptr, partial_ptr, stats_ptr, cu_seqlens_ptr, seq_lens_ptr, tables_ptr,
                 k_scale_ptr, v_scale_ptr, rate, cap, window, q_step_t, q_step_h, k_step, k_step_h, v_step, v_step_h,
                 out_step_t, out_step_h, table_step, rows_per_seq, num_heads, num_splits,
                 GROUP: tl.constexpr, BLOCK_M: tl.constexpr, W0: tl.constexpr, W1: tl.constexpr,
                 DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr,
                 MIN_QUERIES: tl.constexpr,
                 KV: tl.constexpr, DOT: tl.constexpr, HAS_SCALES: tl.constexpr, SOFT_CAP: tl.constexpr,
                 WINDOW: tl.constexpr, INLINE_ASM: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Grid (num_seqs, num_kv_heads, Z): program z takes splits z, z + Z, ... of its sequence and KV head.

    For sequences with MIN_QUERIES .. BLOCK_M // GROUP query tokens. partial: float32 [num_seqs * rows_per_seq,
    num_heads, num_splits, head_dim]; stats: the same with [2], maximum (base 2) and sum, in place of head_dim. Of a
    sequence within one split the result goes straight to `out`.
    """
    seq = tl.program_id(0)
    kv_head = tl.program_id(1)
    row_begin = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - row_begin
    seq_len = tl.load(seq_lens_ptr + seq)
    if q_len < MIN_QUERIES or q_len > BLOCK_M // GROUP or seq_len < q_len:
        return
    context = seq_len - q_len
    split_lo = first_split(context, window, SPLIT, WINDOW)
    split_hi = tl.cdiv(seq_len, SPLIT)
    if split_lo + tl.program_id(2) >= split_hi:
        return
    rate, v_scale = load_scales(rate, k_scale_ptr, v_scale_ptr, kv_head, KV, HAS_SCALES)
    rows = tl.arange(0, BLOCK_M)
    token = rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    is_row = token < q_len
    q_offset = (row_begin + token) * q_step_t + head * q_step_h
    q0, q1 = load_query(q_ptr, q_offset, is_row, W0, W1, DIM, KV, DOT)
    table = tables_ptr + seq.to(tl.int64) * table_step
    # Hoisting out of this loop, which often turns once, would keep both inner loops' addresses in registers at a time.
    for split in tl.range(split_lo + tl.program_id(2), split_hi, tl.num_programs(2), disable_licm=True):
        lo = split * (SPLIT // BLOCK_N)
        hi = tl.minimum(lo + SPLIT // BLOCK_N, tl.cdiv(seq_len, BLOCK_N))
        if WINDOW:
            lo = tl.maximum(lo, tl.maximum(context - window + 1, 0) // BLOCK_N)
        peak, total, acc0, acc1 = attend(
            lo, hi, context, seq_len - 1, q0, q1, k_ptr + kv_head * k_step_h, v_ptr + kv_head * v_step_h, table, k_step,
            v_step, context + token, window, rate, cap, BLOCK_M, W0, W1, DIM, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP,
            WINDOW, INLINE_ASM, STAGES,
        )  # fmt: skip
        if split_hi - split_lo == 1:
            factor = (v_scale / tl.where(is_row, total, 1.0))[:, None]
            out_offset = (row_begin + token) * out_step_t + head * out_step_h
            store_result(out_ptr, out_offset, is_row, acc0 * factor, acc1 * factor, W0, W1, DIM, KV)
        else:
            where = ((seq.to(tl.int64) * rows_per_seq + token) * num_heads + head) * num_splits + split - split_lo
            store_result(partial_ptr, where * DIM, is_row, acc0, acc1, W0, W1, DIM, KV)
            tl.store(stats_ptr + where * 2, peak, mask=is_row)
            tl.store(stats_ptr + where * 2 + 1, total, mask=is_row)


@triton.jit
def reduce_kernel(partial_ptr, stats_ptr, out_ptr, cu_seqlens_ptr, seq_lens_ptr, v_scale_ptr, window, out_step_t,
                  out_step_h, rows_per_seq, num_heads, num_splits, GROUP: tl.constexpr, W: tl.constexpr,
                  DIM: tl.constexpr, SPLIT: tl.constexpr, MAX_QUERIES: tl.constexpr, KV: tl.constexpr,
                  HAS_SCALES: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Grid (num_seqs, num_heads, Z): program z merges the splits of query tokens z, z + Z, ... of one head.

    Reads the splits that hold a position its token sees, in the order of positions, and no other. `STAGES` of them are
    on their way at once.
    """
    seq = tl.program_id(0)
    head = tl.program_id(1)
    row_begin = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - row_begin
    context = tl.load(seq_lens_ptr + seq) - q_len
    split_lo = first_split(context, window, SPLIT, WINDOW)
    if q_len > MAX_QUERIES or context < 0 or tl.cdiv(context + q_len, SPLIT) - split_lo <= 1:
        return
    _, v_scale = load_scales(1.0, v_scale_ptr, v_scale_ptr, head // GROUP, KV, HAS_SCALES)
    one = tl.arange(0, 1)
    is_row = one == 0
    for token in range(tl.program_id(2), q_len, tl.num_programs(2)):
        first = first_split(context + token, window, SPLIT, WINDOW) - split_lo
        last = (context + token) // SPLIT - split_lo
        row = ((seq.to(tl.int64) * rows_per_seq + token) * num_heads + head) * num_splits
        peak = tl.full([1], LOWEST, tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, W], tl.float32)
        for split in tl.range(first, last + 1, num_stages=STAGES):
            where = row + split + one
            part_peak = tl.load(stats_ptr + where * 2)
            part_total = tl.load(stats_ptr + where * 2 + 1)
            part = load_rows(partial_ptr, where * DIM, is_row, 0, W, DIM)
            peak, total, acc, _ = merge(peak, total, acc, 0.0, part_peak, part_total, part, 0.0, 0)
        out_offset = (row_begin + token) * out_step_t + head * out_step_h + one
        store_rows(out_ptr, out_offset, is_row, acc * (v_scale / total)[:, None], 0, W, DIM)
