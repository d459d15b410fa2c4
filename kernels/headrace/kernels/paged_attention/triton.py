"""Paged attention on a GPU: checks, grids and launches of the Triton kernels. Called by `headrace.kernels.gpu`.

Allocates nothing and never waits for the device: grids are upper bounds made of host integers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from headrace.kernels.paged_attention.config import MAX_SPLIT_ROWS, AttentionConfig
from headrace.kernels.paged_attention.triton_prefill import prefill_kernel
from headrace.kernels.paged_attention.triton_split import reduce_kernel, split_kernel
from headrace.kernels.paged_attention.triton_unpack import KV_FP8, KV_INT8, KV_PLAIN

LOG2_E = math.log2(math.e)
COMPUTE_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
KV_KINDS = {torch.float8_e4m3fn: KV_FP8.value, torch.uint8: KV_FP8.value, torch.int8: KV_INT8.value}


def split_rows(group: int) -> tuple[int, int]:
    """Rows of the two tiles of the split kernel: for decode, and for sequences with some query tokens more.

    Which of them, or the prefill kernel, a sequence gets follows from its number of query tokens and the group alone.
    """
    small = max(16, triton.next_power_of_2(group))
    return small, max(small, MAX_SPLIT_ROWS)


def workspace_bytes(
    *,
    num_seqs: int,
    max_query_len: int,
    max_seq_len: int,
    num_heads: int,
    group: int,
    head_dim: int,
    config: AttentionConfig,
) -> int:
    """Bytes of `workspace` that a call with at most these sizes needs: float32 partial results of every split."""
    num_splits = -(-max_seq_len // config.split)
    if num_splits <= 1:
        return 0
    rows = num_seqs * min(max_query_len, split_rows(group)[1] // group)
    return rows * num_heads * num_splits * (head_dim + 2) * 4


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_seqs: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    config: AttentionConfig,
) -> None:
    """out = attention of the rows of the first num_seqs sequences; the contract is in this package's docstring.

    max_query_len, max_seq_len: upper bounds over those sequences. workspace: 1-D uint8 of at least `workspace_bytes`,
    16-byte aligned, or None where that is 0. Raises ValueError on what it does not support, before any launch.
    """
    _check(q, k_cache, v_cache, out, cu_seqlens_q, seq_lens, block_tables, num_seqs, k_scale, v_scale, config)
    if num_seqs == 0 or q.shape[0] == 0:
        return
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    kind = KV_PLAIN.value if k_cache.dtype == q.dtype else KV_KINDS[k_cache.dtype]
    # Bytes become fp16 exactly; to bf16 they would go by way of fp32.
    dot = tl.float16 if kind != KV_PLAIN.value and q.dtype == torch.bfloat16 else COMPUTE_TYPES[q.dtype]
    if kind != KV_PLAIN.value:
        k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
    rate, cap = soft_cap_factors(scale, soft_cap) if soft_cap > 0.0 else (scale * LOG2_E, 0.0)
    w0, w1 = _widths(head_dim, kind)
    sizes = {"GROUP": group, "DIM": head_dim, "KV": kind, "HAS_SCALES": k_scale is not None, "WINDOW": window > 0}
    kinds = sizes | {
        "W0": w0, "W1": w1, "BLOCK_N": config.block_n, "BLOCK_SIZE": block_size, "DOT": dot,
        "SOFT_CAP": soft_cap > 0.0, "INLINE_ASM": kind != KV_PLAIN.value and dot == tl.float16 and _has_ptx(),
    }  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1), v_cache.stride(0), v_cache.stride(1),
        out.stride(0), out.stride(1), block_tables.stride(0),
    )  # fmt: skip
    small, large = split_rows(group)
    if max_query_len > large // group:
        block_m = max(config.prefill_block_m, triton.next_power_of_2(group))
        prefill_kernel[q.shape[0] // (block_m // group) + num_seqs, num_kv_heads](
            q, k_cache, v_cache, out, cu_seqlens_q, seq_lens, block_tables, k_scale, v_scale, rate, cap, window,
            *strides, num_seqs, BLOCK_M=block_m, SPLIT=config.split,
            MIN_QUERIES=large // group + 1, STAGES=config.prefill_stages,
            num_warps=config.prefill_warps, **kinds,
        )  # fmt: skip
    rows_per_seq = min(max_query_len, large // group)
    num_splits = -(-max_seq_len // config.split)
    partial, stats = _partials(workspace, num_seqs * rows_per_seq * num_heads, num_splits, head_dim, out)
    turns = -(-config.max_programs // (num_seqs * num_kv_heads))
    grid = num_seqs, num_kv_heads, min(num_splits, turns)
    for block_m, min_queries, warps, stages in (
        (small, 1, config.split_warps, config.split_stages),
        (large, small // group + 1, config.verify_warps, config.verify_stages),
    ):
        if min_queries <= min(max_query_len, block_m // group):
            split_kernel[grid](
                q, k_cache, v_cache, out, partial, stats, cu_seqlens_q, seq_lens, block_tables, k_scale, v_scale, rate,
                cap, window, *strides, rows_per_seq, num_heads, num_splits, BLOCK_M=block_m, MIN_QUERIES=min_queries,
                SPLIT=config.split, STAGES=stages, num_warps=warps, **kinds,
            )  # fmt: skip
    if num_splits > 1:
        # In a mixed batch most sequences have one row, and nobody knows the others' number without asking the device.
        tokens = rows_per_seq if max_query_len <= large // group else 1
        reduce_kernel[num_seqs, num_heads, tokens](
            partial, stats, out, cu_seqlens_q, seq_lens, v_scale, window, out.stride(0), out.stride(1), rows_per_seq,
            num_heads, num_splits, W=triton.next_power_of_2(head_dim), SPLIT=config.split, MAX_QUERIES=large // group,
            STAGES=4, num_warps=1, **sizes,
        )  # fmt: skip


def soft_cap_factors(scale: float, soft_cap: float) -> tuple[float, float]:
    """(rate, cap) such that cap - 2 cap / (1 + 2^(rate * s)) = soft_cap * tanh(scale * s / soft_cap) * log2(e)."""
    return 2.0 * LOG2_E * scale / soft_cap, soft_cap * LOG2_E


def _widths(head_dim: int, kind: int) -> tuple[int, int]:
    """Columns of the two parts of a tile, powers of two; what they have beyond head_dim is never loaded."""
    if kind != KV_PLAIN.value:
        half = max(16, triton.next_power_of_2(head_dim // 2))  # a matrix instruction takes no fewer
        return half, half
    first = 1 << (head_dim.bit_length() - 1)
    # 16 columns are too few for four warps: they would all do the same work.
    return first, max(32, triton.next_power_of_2(head_dim - first)) if head_dim > first else 0


def _has_ptx() -> bool:
    """Whether kernels are compiled for an NVIDIA GPU; the interpreter has no target, and runs the plain forms."""
    if triton.knobs.runtime.interpret:
        return False
    return bool(triton.runtime.driver.active.get_current_target().backend == "cuda")


def _partials(
    workspace: torch.Tensor | None, rows: int, num_splits: int, head_dim: int, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the workspace: float32 partial sums [count * head_dim] and (maximum, sum) [count * 2]."""
    if num_splits <= 1:
        return out, out  # never written: every sequence is within one split
    count = rows * num_splits
    need = count * (head_dim + 2) * 4
    if workspace is None or workspace.numel() * workspace.element_size() < need:
        have = 0 if workspace is None else workspace.numel() * workspace.element_size()
        raise ValueError(f"workspace holds {have} bytes, this step needs {need}")
    floats = workspace.view(torch.uint8)[:need].view(torch.float32)
    return floats[: count * head_dim], floats[count * head_dim :]


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor, block_tables: torch.Tensor, num_seqs: int, k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None, config: AttentionConfig,
) -> None:  # fmt: skip
    if q.ndim != 3 or out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"q and out must be [T, num_heads, head_dim] alike, are {q.shape} {out.shape}")
    if q.dtype not in COMPUTE_TYPES:
        raise ValueError(f"q must be float32, float16 or bfloat16, is {q.dtype}")
    if k.ndim != 4 or k.shape != v.shape or k.dtype != v.dtype or k.shape[3] != q.shape[2]:
        raise ValueError(f"want k and v [num_blocks + 1, num_kv_heads, block_size, {q.shape[2]}] alike, "
                         f"are {k.shape} {k.dtype} and {v.shape} {v.dtype}")  # fmt: skip
    if k.dtype != q.dtype and k.dtype not in KV_KINDS:
        raise ValueError(f"KV must be {q.dtype}, float8_e4m3fn, uint8 (its bits) or int8, is {k.dtype}")
    head_dim, block_size = k.shape[3], k.shape[2]
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise ValueError(f"head_dim must be a multiple of 16 in 16 .. 256, is {head_dim}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} heads cannot be grouped over {k.shape[1]} KV heads")
    if block_size % config.block_n:
        raise ValueError(f"block_size {block_size} is no multiple of the config's block_n {config.block_n}")
    for name, tensor in (("q", q), ("out", out)):
        if tensor.stride(2) != 1:
            raise ValueError(f"the last axis of {name} must be dense, strides are {tensor.stride()}")
    for name, tensor in (("k_cache", k), ("v_cache", v)):
        if tensor.stride()[2:] != (head_dim, 1):
            raise ValueError(f"a (block, head) of {name} must be dense, strides are {tensor.stride()}")
    for name, tensor, size in (("cu_seqlens_q", cu_seqlens_q, num_seqs + 1), ("seq_lens", seq_lens, num_seqs)):
        if tensor.dtype != torch.int32 or tensor.ndim != 1 or tensor.numel() < size or tensor.stride(0) != 1:
            raise ValueError(f"{name} must be dense int32 of at least {size}, is {tensor.dtype} {tensor.shape}")
    if block_tables.dtype != torch.int32 or block_tables.ndim != 2 or block_tables.stride(1) != 1:
        raise ValueError(f"block_tables must be int32 [B, W], rows dense, is {block_tables.dtype} {block_tables.shape}")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale go together")
    for scale in (k_scale, v_scale):
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != (k.shape[1],)):
            raise ValueError(f"scales must be float32 [{k.shape[1]}], are {scale.dtype} {scale.shape}")
