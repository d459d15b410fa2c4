"""Attention calls that are compiled: decode and prefill of every model, every KV type, every head size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from headrace.kernels.paged_attention import AttentionConfig, default_config
from headrace.kernels.paged_attention.triton import paged_attention

from tests.gpu.aot.cases import Case
from tests.gpu.aot.models import LLAMA_8B, MODELS, has_fp8, meta
from tests.gpu.aot.targets import Target

BLOCK_SIZE = 64
MAX_SEQ_LEN = 8192


def attend(
    target: Target,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    num_seqs: int,
    query_len: int,
    kv: str = "bf16",
    window: int = 0,
    soft_cap: float = 0.0,
    config: AttentionConfig | None = None,
) -> None:
    """One call for `num_seqs` sequences of up to MAX_SEQ_LEN positions and `query_len` rows each."""
    if config is None:
        config = default_config(
            head_dim=head_dim,
            compute_bytes=2,
            kv_bytes=2 if kv == "bf16" else 1,
            block_size=BLOCK_SIZE,
            has_window_or_cap=window > 0 or soft_cap > 0.0,
            arch=f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch),
        )
    types = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8-bits": torch.uint8}
    caches = [meta(1001, kv_heads, BLOCK_SIZE, head_dim, dtype=types[kv]) for _ in "kv"]
    scales = None if kv == "bf16" else meta(kv_heads, dtype=torch.float32)
    # q is a view of the buffer that one product writes q, k and v to.
    tokens = num_seqs * query_len
    q = meta(tokens, (heads + 2 * kv_heads) * head_dim)[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    paged_attention(
        q,
        *caches,
        meta(tokens, heads, head_dim),
        cu_seqlens_q=meta(num_seqs + 1, dtype=torch.int32),
        seq_lens=meta(num_seqs, dtype=torch.int32),
        block_tables=meta(num_seqs, MAX_SEQ_LEN // BLOCK_SIZE, dtype=torch.int32),
        num_seqs=num_seqs,
        max_query_len=query_len,
        max_seq_len=MAX_SEQ_LEN,
        scale=head_dim**-0.5,
        window=window,
        soft_cap=soft_cap,
        k_scale=scales,
        v_scale=scales,
        workspace=meta(1 << 30, dtype=torch.uint8),
        config=config,
    )


def _default(target: Target, head_dim: int, kv_bytes: int) -> AttentionConfig:
    arch = f"sm_{target.arch}" if target.is_cuda else str(target.arch)
    return default_config(head_dim=head_dim, compute_bytes=2, kv_bytes=kv_bytes, block_size=BLOCK_SIZE, arch=arch)


def cases() -> Iterator[Case]:
    for model in MODELS:
        shape = {"heads": model.heads, "kv_heads": model.kv_heads, "head_dim": model.head_dim}
        for name, seqs, rows in (("decode", 16, 1), ("prefill", 2, 1024)):
            call = partial(attend, **shape, num_seqs=seqs, query_len=rows)
            yield Case(f"attention/{name}/{model.name}", call, "float", is_quick=model is LLAMA_8B)
    llama = {"heads": 32, "kv_heads": 8}
    for name, seqs, rows in (("decode", 16, 1), ("verify", 16, 4), ("prefill", 2, 1024)):
        for kv in ("int8", "fp8", "fp8-bits"):
            if (name, kv) != ("verify", "fp8-bits"):
                call = partial(attend, **llama, head_dim=128, num_seqs=seqs, query_len=rows, kv=kv)
                is_quick = name == "decode" and kv != "fp8-bits"
                yield Case(
                    f"attention/{name}/kv-{kv}", call, "float", has_fp8 if kv == "fp8" else _any, is_quick=is_quick
                )
        for head_dim in (16, 64, 80, 96, 256):
            call = partial(attend, **llama, head_dim=head_dim, num_seqs=seqs, query_len=rows)
            yield Case(f"attention/{name}/head-dim-{head_dim}", call, "float")
        window = partial(attend, **llama, head_dim=128, num_seqs=seqs, query_len=rows, window=4096, soft_cap=50.0)
        yield Case(f"attention/{name}/window-and-soft-cap", window, "float")


def _any(target: Target) -> bool:
    return True
