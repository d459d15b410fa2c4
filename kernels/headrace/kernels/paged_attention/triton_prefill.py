"""Attention of sequences with many query rows (prefill chunks): one program per block of query rows and KV head.

Called by triton.py. KV is taken in the splits of triton_split.py and merged in its order by the same operations: a
row's bits are those that it would have as a decode row, wherever its chunk began.
"""

import triton
import triton.language as tl
from headrace.kernels.paged_attention.triton_tile import (
    LOWEST,
    attend,
    first_split,
    load_query,
    load_scales,
    merge,
    store_result,
)


@triton.jit
def find_sequence(cu_seqlens_ptr, index, num_seqs, BLOCK_Q: tl.constexpr):
    """Sequence of query block `index`, where sequence s owns the blocks from cu_seqlens[s] // BLOCK_Q + s.

    Every sequence thus owns at least its own number of blocks, without a table of them.
    """
    lo = 0
    hi = num_seqs
    while hi - lo > 1:
        middle = (lo + hi) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK_Q + middle <= index:
            lo = middle
        else:
            hi = middle
    return lo


@triton.jit
def prefill_kernel(q_ptr, k_ptr, v_ptr, out_ptr, cu_seqlens_ptr, seq_lens_ptr, tables_ptr, k_scale_ptr, v_scale_ptr,
                   rate, cap, window, q_step_t, q_step_h, k_step, k_step_h, v_step, v_step_h, out_step_t, out_step_h,
                   table_step, num_seqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, W0: tl.constexpr,
                   W1: tl.constexpr, DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
                   SPLIT: tl.constexpr, MIN_QUERIES: tl.constexpr, KV: tl.constexpr, DOT: tl.constexpr,
                   HAS_SCALES: tl.constexpr, SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr, INLINE_ASM: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """Grid (T // BLOCK_Q + num_seqs, num_kv_heads), BLOCK_Q = BLOCK_M // GROUP; late blocks, the long ones, first.

    For sequences with at least MIN_QUERIES query tokens.
    """
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    index = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = find_sequence(cu_seqlens_ptr, index, num_seqs, BLOCK_Q)
    row_begin = tl.load(cu_seqlens_ptr + seq)
    q_len = tl.load(cu_seqlens_ptr + seq + 1) - row_begin
    context = tl.load(seq_lens_ptr + seq) - q_len
    token_lo = (index - (row_begin // BLOCK_Q + seq)) * BLOCK_Q
    if q_len < MIN_QUERIES or token_lo < 0 or token_lo >= q_len or context < 0:
        return
    rate, v_scale = load_scales(rate, k_scale_ptr, v_scale_ptr, kv_head, KV, HAS_SCALES)
    rows = tl.arange(0, BLOCK_M)
    token = token_lo + rows // GROUP
    token_hi = tl.minimum(token_lo + BLOCK_Q, q_len)
    is_row = token < token_hi
    head = kv_head * GROUP + rows % GROUP
    q_offset = (row_begin + token) * q_step_t + head * q_step_h
    q0, q1 = load_query(q_ptr, q_offset, is_row, W0, W1, DIM, KV, DOT)
    first_pos = context + token_lo
    last_pos = context + token_hi - 1
    table = tables_ptr + seq.to(tl.int64) * table_step
    peak = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc0 = tl.zeros([BLOCK_M, W0], tl.float32)
    acc1 = 0.0
    if W1 > 0:
        acc1 = tl.zeros([BLOCK_M, W1], tl.float32)
    # As in split_kernel: hoisting would keep more in registers than there are.
    for split in tl.range(first_split(first_pos, window, SPLIT, WINDOW), last_pos // SPLIT + 1, disable_licm=True):
        lo = split * (SPLIT // BLOCK_N)
        hi = tl.minimum(lo + SPLIT // BLOCK_N, tl.cdiv(last_pos + 1, BLOCK_N))
        if WINDOW:
            lo = tl.maximum(lo, tl.maximum(first_pos - window + 1, 0) // BLOCK_N)
        part_peak, part_total, part0, part1 = attend(
            lo, hi, first_pos, last_pos, q0, q1, k_ptr + kv_head * k_step_h, v_ptr + kv_head * v_step_h, table, k_step,
            v_step, context + token, window, rate, cap, BLOCK_M, W0, W1, DIM, BLOCK_N, BLOCK_SIZE, KV, DOT, SOFT_CAP,
            WINDOW, INLINE_ASM, STAGES,
        )  # fmt: skip
        peak, total, acc0, acc1 = merge(peak, total, acc0, acc1, part_peak, part_total, part0, part1, W1)
    factor = (v_scale / tl.where(is_row, total, 1.0))[:, None]
    out_offset = (row_begin + token) * out_step_t + head * out_step_h
    store_result(out_ptr, out_offset, is_row, acc0 * factor, acc1 * factor, W0, W1, DIM, KV)
