"""Products that are compiled: every matrix of every model in the kinds that it is served in, for few and many rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.epilogue import NextNorm, RopeKvEpilogue
from headrace.kernels.linear.layout import SQUARES_COLUMNS
from headrace.kernels.linear.triton import QUANTIZED, linear

from tests.gpu.aot.cases import Case
from tests.gpu.aot.models import LLAMA_8B, LLAMA_70B_TP4, QWEN3_32B, SMOLLM2, ModelShape, has_fp8, meta, weight
from tests.gpu.aot.targets import Target

# Rows of a step: one sequence, a decode batch, a large one, prefill chunks.
ROWS = (1, 16, 64, 512, 2048)
MANY = 512
KINDS = {
    SMOLLM2.name: ("int4-g32z", "int8-g32"),
    LLAMA_8B.name: ("int4-g32z", "int4-g128", "int8-g32", "dense", "w8a8", "fp8", "fp8_block"),
    QWEN3_32B.name: ("int4-g128z", "fp8_block"),
    LLAMA_70B_TP4.name: ("int4-g128", "fp8"),
}


@dataclass(frozen=True)
class Matrix:
    """One product of a layer: n x k, and what is fused around it. has_norm: the product before has prepared it, and
    this one finishes it; has_residual: this one prepares the next. has_prologue: a norm that nobody prepared."""

    name: str
    n: int
    k: int
    has_norm: bool = False
    has_prologue: bool = False
    is_gated: bool = False
    has_residual: bool = False
    is_head: bool = False
    model: ModelShape | None = None  # of q, k and v: their heads are turned and written where they are computed


def matrices(model: ModelShape) -> tuple[Matrix, ...]:
    return (
        Matrix("qkv", model.qkv, model.hidden, has_norm=True, model=model),
        Matrix("output", model.hidden, model.heads * model.head_dim, has_residual=True),
        Matrix("gate-up", 2 * model.ffn, model.hidden, has_norm=True, is_gated=True),
        Matrix("down", model.hidden, model.ffn, has_residual=True),
        Matrix("head", model.vocab, model.hidden, has_norm=True, is_head=True),
    )


def multiply(
    target: Target, *, matrix: Matrix, kind: str, rows: int, config: LinearConfig | None = None, bias: bool = False
) -> None:
    """One product of `rows` rows. Quantised activations (w8a8, fp8) come with their scales, and so without a norm: one
    of its own has quantised them."""
    packed = weight(kind, matrix.n, matrix.k, is_gated=matrix.is_gated)
    quantized = QUANTIZED.get(packed.kind)
    x = meta(rows, matrix.k, dtype=packed.dtype if quantized is None else quantized)
    scale_shape = (rows, -(-matrix.k // 128)) if kind == "fp8_block" else (rows,)
    out = meta(rows, packed.out_features, dtype=torch.float32 if matrix.is_head else packed.dtype)
    out_scale = None
    if kind == "fp8_block" and matrix.is_gated:  # what down reads is quantised where it is computed
        out = meta(rows, packed.out_features, dtype=torch.float8_e4m3fn)
        out_scale = meta(rows, -(-packed.out_features // 128), dtype=torch.float32)
    is_wide = quantized is None
    following = NextNorm(meta(matrix.n, dtype=torch.float32), meta(rows, matrix.n), squares_of(rows, matrix.n))
    linear(
        x,
        packed,
        out,
        norm=(meta(matrix.k, dtype=torch.float32), 1e-5) if matrix.has_prologue else None,
        squares=(squares_of(rows, matrix.k), 1e-5) if matrix.has_norm and is_wide else None,
        next_norm=following if matrix.has_residual and is_wide else None,
        out_scale=out_scale,
        bias=meta(matrix.n, dtype=torch.float32) if bias else None,
        residual=out if matrix.has_residual else None,
        activation="silu" if matrix.is_gated else None,
        rope_kv=None if matrix.model is None else epilogue(matrix.model, rows),
        x_scale=None if quantized is None else meta(*scale_shape, dtype=torch.float32),
        workspace=meta(1 << 30, dtype=torch.uint8),
        config=config,
    )


def squares_of(rows: int, columns: int) -> torch.Tensor:
    return meta(rows, -(-columns // SQUARES_COLUMNS), dtype=torch.float32)


def epilogue(model: ModelShape, rows: int) -> RopeKvEpilogue:
    caches = [meta(1001, model.kv_heads, 64, model.head_dim) for _ in "kv"]
    norm = meta(model.head_dim, dtype=torch.float32) if model.has_qk_norm else None
    return RopeKvEpilogue(
        *caches,
        positions=meta(rows, dtype=torch.int32),
        slot_mapping=meta(rows, dtype=torch.int32),
        head_dim=model.head_dim,
        num_heads=model.heads,
        inv_freq=meta(model.head_dim // 2, dtype=torch.float32),
        q_norm=norm,
        k_norm=norm,
        eps=1e-6,
    )


def cases() -> Iterator[Case]:
    for model in (SMOLLM2, LLAMA_8B, QWEN3_32B, LLAMA_70B_TP4):
        for kind in KINDS[model.name]:
            runs_on = has_fp8 if kind.startswith("fp8") else _any
            for matrix in matrices(model):
                if matrix.is_head and kind in ("w8a8", "fp8", "fp8_block"):
                    continue  # the output head stays in int8 or 16 bits
                is_full = model is LLAMA_8B and matrix.name in ("qkv", "gate-up", "down")
                for rows in ROWS[0 if kind == "int4-g32z" else 1 :] if is_full else (16, 512, 2048):
                    is_quick = model is LLAMA_8B and matrix.name in ("qkv", "gate-up", "down") and rows in (16, 2048)
                    is_quick = is_quick and kind in ("int4-g32z", "int4-g128", "int8-g32", "dense")
                    call = partial(multiply, matrix=matrix, kind=kind, rows=rows)
                    unit = "int8" if kind == "w8a8" else "many" if rows >= MANY else "float"
                    name = f"linear/{kind}/{model.name}/{matrix.name}/{rows}"
                    yield Case(name, call, unit, runs_on, is_quick)

    # Where nobody prepares the norm: after an embedding, after a gather of rows, between Gemma's norms.
    for kind in ("int4-g32z", "dense"):
        matrix = Matrix("norm-gate-up", 2 * LLAMA_8B.ffn, LLAMA_8B.hidden, has_prologue=True, is_gated=True)
        for rows in (16, 2048):
            call = partial(multiply, matrix=matrix, kind=kind, rows=rows)
            yield Case(f"linear/{kind}/{LLAMA_8B.name}/{matrix.name}/{rows}", call, "float", _any)


def _any(target: Target) -> bool:
    return True
