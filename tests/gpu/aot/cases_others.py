"""Norms, rotary embedding, embedding, sampling and block copies that are compiled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from headrace.kernels.activation.triton import gated_activation
from headrace.kernels.activation.triton_quantize import quantize_rows
from headrace.kernels.embed.triton import embed
from headrace.kernels.rms_norm.triton import rms_norm
from headrace.kernels.rope.triton import rope_kv

from tests.gpu.aot.cases import Case
from tests.gpu.aot.models import LLAMA_8B, MODELS, QWEN3_32B, ModelShape, has_fp8, meta
from tests.gpu.aot.targets import Target

ROWS = 512


TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8-block": torch.float8_e4m3fn}


def scales(kind: str, width: int) -> torch.Tensor:
    """Of rows in 8 bits: one each, or one for each 128 columns."""
    return meta(*((ROWS, -(-width // 128)) if kind == "fp8-block" else (ROWS,)), dtype=torch.float32)


def norm(target: Target, *, width: int, group: int, has_residual: bool = False, quantized: str = "") -> None:
    x = meta(ROWS, width)
    rms_norm(
        x,
        meta(group, dtype=torch.float32),
        1e-5,
        meta(ROWS, width, dtype=TYPES[quantized]) if quantized else x,
        residual=meta(ROWS, width) if has_residual else None,
        group=group,
        out_scale=scales(quantized, width) if quantized else None,
    )


def quantize(target: Target, *, kind: str, width: int, is_gated: bool = False) -> None:
    x, out = meta(ROWS, width), meta(ROWS, width, dtype=TYPES[kind])
    if is_gated:
        gated_activation(x, meta(ROWS, width), "silu", out, out_scale=scales(kind, width))
    else:
        quantize_rows(x, out, scales(kind, width))


def turn(target: Target, *, model: ModelShape, kv: torch.dtype = torch.bfloat16, head_dim: int = 0) -> None:
    head_dim = head_dim or model.head_dim
    qkv = meta(ROWS, (model.heads + 2 * model.kv_heads) * head_dim)
    q, k, v = qkv.split([model.heads * head_dim, model.kv_heads * head_dim, model.kv_heads * head_dim], dim=1)
    caches = [meta(1001, model.kv_heads, 64, head_dim, dtype=kv) for _ in "kv"]
    scale = meta(model.kv_heads, dtype=torch.float32) if kv.itemsize == 1 else None
    rope_kv(
        q,
        k,
        v,
        *caches,
        positions=meta(ROWS, dtype=torch.int32),
        slot_mapping=meta(ROWS, dtype=torch.int32),
        inv_freq=meta(head_dim // 2, dtype=torch.float32),
        attention_factor=1.0,
        head_dim=head_dim,
        q_norm=meta(head_dim, dtype=torch.float32) if model.has_qk_norm else None,
        k_norm=meta(head_dim, dtype=torch.float32) if model.has_qk_norm else None,
        eps=1e-6,
        k_scale=scale,
        v_scale=scale,
    )


def look_up(target: Target, *, model: ModelShape) -> None:
    embed(meta(ROWS, dtype=torch.int32), meta(model.vocab, model.hidden), 1.0, meta(ROWS, model.hidden))


def cases() -> Iterator[Case]:
    for model in MODELS:
        for name, kwargs in (("plain", {}), ("residual", {"has_residual": True})):
            call = partial(norm, width=model.hidden, group=model.hidden, **kwargs)
            yield Case(f"rms_norm/{name}/{model.name}", call, is_quick=model is LLAMA_8B)
        yield Case(f"rope_kv/{model.name}", partial(turn, model=model), is_quick=model is QWEN3_32B)
        yield Case(f"embed/{model.name}", partial(look_up, model=model), is_quick=model is LLAMA_8B)
    heads = QWEN3_32B.heads * QWEN3_32B.head_dim
    yield Case("rms_norm/heads/qwen3-32b", partial(norm, width=heads, group=QWEN3_32B.head_dim))
    for kind, runs_on in (("int8", _any), ("fp8", has_fp8), ("fp8-block", has_fp8)):
        call = partial(norm, width=4096, group=4096, has_residual=True, quantized=kind)
        yield Case(f"rms_norm/to-{kind}/llama-3-8b", call, runs_on=runs_on)
        for name, width, is_gated in (("rows", 14336, False), ("gated", 14336, True)):
            call = partial(quantize, kind=kind, width=width, is_gated=is_gated)
            yield Case(f"quantize/{name}-{kind}/llama-3-8b", call, runs_on=runs_on)
    kinds = (("int8", torch.int8, _any), ("fp8", torch.float8_e4m3fn, has_fp8), ("fp8-bits", torch.uint8, _any))
    for name, dtype, runs_on in kinds:
        yield Case(f"rope_kv/kv-{name}", partial(turn, model=LLAMA_8B, kv=dtype), runs_on=runs_on)
    for head_dim in (80, 96):
        yield Case(f"rope_kv/head-dim-{head_dim}", partial(turn, model=LLAMA_8B, head_dim=head_dim))


def _any(target: Target) -> bool:
    return True
