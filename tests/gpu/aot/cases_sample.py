"""Sampling, lone activations and block moves that are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from headrace.kernels.activation.triton import gated_activation, soft_cap
from headrace.kernels.kv_blocks.triton import CacheSet, copy_blocks, gather_blocks, scatter_blocks
from headrace.kernels.sample.device import FIELDS, DeviceSampling, DeviceTokens
from headrace.kernels.sample.triton import feed, sample, workspace_bytes

from tests.gpu.aot.cases import Case
from tests.gpu.aot.models import LLAMA_8B, QWEN3_32B, SMOLLM2, ModelShape, meta
from tests.gpu.aot.targets import Target

ROWS, ENTRIES = 64, 1000
I32, F32 = torch.int32, torch.float32


def sampling(target: Target, *, model: ModelShape, has_all: bool) -> None:
    """Every kernel of sampling, or the two of rows without filters."""
    rows = meta(ROWS, len(FIELDS), dtype=I32)
    entries = meta(ENTRIES if has_all else 0, 4, dtype=I32)
    params = DeviceSampling(rows, entries, num_top=5 if has_all else 0, has_select=has_all, has_pending=has_all)
    out = DeviceTokens.of(meta(DeviceTokens.words_for(ROWS), dtype=I32), ROWS)
    workspace = meta(workspace_bytes(ROWS, model.vocab, ENTRIES) // 4, dtype=F32)
    previous = meta(ROWS, dtype=I32) if has_all else None
    sample(meta(ROWS, model.vocab, dtype=F32), params, out, workspace, previous=previous)


def feeding(target: Target) -> None:
    feed(meta(ROWS, dtype=I32), meta(512, dtype=I32), meta(512, dtype=I32))


def moves(target: Target, *, model: ModelShape) -> None:
    caches = CacheSet.of(list(meta(4, 100, model.kv_heads, 64, model.head_dim)))
    blocks, staging = meta(8, dtype=I32), meta(8, 4, caches.block_words * 4, dtype=torch.uint8)
    copy_blocks(caches, meta(8, 2, dtype=I32))
    gather_blocks(caches, blocks, staging)
    scatter_blocks(caches, blocks, staging)


def gated(target: Target, *, model: ModelShape) -> None:
    gate, up = meta(512, 2 * model.ffn).chunk(2, dim=1)
    for kind in ("silu", "gelu_tanh"):
        gated_activation(gate, up, kind, meta(512, model.ffn))  # type: ignore[arg-type]


def capped(target: Target, *, model: ModelShape) -> None:
    soft_cap(meta(ROWS, model.vocab, dtype=F32), 30.0)


def cases() -> Iterator[Case]:
    for model in (SMOLLM2, QWEN3_32B):
        yield Case(f"sample/plain/{model.name}", partial(sampling, model=model, has_all=False))
        is_quick = model is QWEN3_32B
        yield Case(f"sample/all/{model.name}", partial(sampling, model=model, has_all=True), is_quick=is_quick)
        yield Case(f"kv_blocks/{model.name}", partial(moves, model=model), is_quick=is_quick)
    yield Case("sample/feed", feeding)
    yield Case("gated_activation/llama-3-8b", partial(gated, model=LLAMA_8B))
    yield Case("soft_cap/qwen3-32b", partial(capped, model=QWEN3_32B))
