"""Runs the ops of a GpuProgram on the device's batch: every op one launch, none waits for the device.

Called by `executor.py` for a step, and while a CUDA graph of one is captured. All buffers are made once, for the
largest step; a step uses their first rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from headrace.kernels.activation.triton import gated_activation, soft_cap
from headrace.kernels.activation.triton_quantize import quantize_rows
from headrace.kernels.embed.triton import embed
from headrace.kernels.gpu.cache import LayerCache
from headrace.kernels.gpu.ops import (
    Attention,
    Embed,
    GpuOp,
    GpuProgram,
    NextNorm,
    Norm,
    Product,
    QuantizeGated,
    QuantizeRows,
    RopeKv,
    TypedBuffer,
)
from headrace.kernels.gpu.setup import Launching
from headrace.kernels.gpu.shape import StepLimits, StepShape
from headrace.kernels.gpu.staging import DeviceBatch
from headrace.kernels.gpu.triton_rows import add, select
from headrace.kernels.gpu.triton_tokens import resolve_tokens
from headrace.kernels.gpu.weights import DeviceWeights
from headrace.kernels.linear.epilogue import NextNorm as ProductsNextNorm
from headrace.kernels.linear.epilogue import RopeKvEpilogue
from headrace.kernels.linear.triton import linear
from headrace.kernels.program import Add, GatedActivation, SelectRows, SoftCap
from headrace.kernels.rms_norm.triton import rms_norm
from headrace.kernels.rope.triton import rope_kv

_TYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}  # of a TypedBuffer


class StepRunner:
    """One program, its weights and its buffers on one device."""

    def __init__(
        self,
        program: GpuProgram,
        weights: DeviceWeights,
        limits: StepLimits,
        dtype: torch.dtype,
        batch: DeviceBatch,
        launching: Launching,
        sampled: torch.Tensor,
    ) -> None:
        self._program = program
        self._weights = weights
        self._batch = batch
        self._launching = launching
        self._sampled = sampled
        self._device = batch.token_ids.device
        self.caches: list[LayerCache] = []
        self._rows = {buffer.name: buffer.rows for buffer in program.buffers}
        self._rows |= {view.name: self._rows[view.buffer] for view in program.views}
        self._buffers = self._allocate(limits, dtype)
        self._same = {op.out: op.x for op in program.ops if isinstance(op, SelectRows)}
        self._inv_freqs: dict[tuple[float, ...], torch.Tensor] = {}
        self._ops = [(_RUN[type(op)], op) for op in program.ops]

    def run(self, shape: StepShape) -> None:
        """Launch all ops of a step whose batch is on the device; the logits are in `logits(shape)` when they are
        done."""
        resolve_tokens(self._batch.token_ids[: shape.num_tokens], self._sampled)
        for run, op in self._ops:
            run(self, op, shape)

    def logits(self, shape: StepShape) -> torch.Tensor:
        """float32 [num_logits, vocab_size]."""
        return self._tensor(self._program.logits, shape)

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        owned = [self._buffers[buffer.name] for buffer in self._program.buffers]
        return sum(tensor.numel() * tensor.element_size() for tensor in owned)

    def _allocate(self, limits: StepLimits, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        buffers = {}
        for buffer in self._program.buffers:
            rows = limits.max_tokens if buffer.rows == "tokens" else limits.max_logit_rows
            kind = torch.float32 if buffer.name == self._program.logits else dtype
            if isinstance(buffer, TypedBuffer):
                kind = _TYPES[buffer.kind]
            # Zeros: rows that no step has written yet hold no NaN that a profile of memory could meet.
            buffers[buffer.name] = torch.zeros((rows, buffer.width), dtype=kind, device=self._device)
        for view in self._program.views:
            buffers[view.name] = buffers[view.buffer][:, view.column : view.column + view.width]
        return buffers

    def _tensor(self, name: str, shape: StepShape) -> torch.Tensor:
        """The rows of a buffer that a step uses. Where all rows are wanted, nothing is selected: the two are one."""
        if shape.selects_all:
            name = self._same.get(name, name)
        rows = shape.num_tokens if self._rows[name] == "tokens" else shape.num_logits
        return self._buffers[name][:rows]

    def _vector(self, name: str | None) -> torch.Tensor | None:
        return None if name is None else self._weights.vectors[name]

    def _scale(self, name: str | None, shape: StepShape) -> torch.Tensor | None:
        """float32 [rows], or [rows, groups] where a row has several scales."""
        if name is None:
            return None
        scales = self._tensor(name, shape)
        return scales[:, 0] if scales.shape[1] == 1 else scales

    def _row_scale(self, name: str | None, kind: str, shape: StepShape) -> torch.Tensor | None:
        """As `_scale`, but [rows, 1] too for a product in fp8_block."""
        scales = self._scale(name, shape)
        return scales.view(len(scales), -1) if scales is not None and kind == "fp8_block" else scales

    def _inv_freq(self, op: RopeKv) -> torch.Tensor:
        if op.inv_freq not in self._inv_freqs:
            self._inv_freqs[op.inv_freq] = torch.tensor(op.inv_freq, dtype=torch.float32, device=self._device)
        return self._inv_freqs[op.inv_freq]

    def _embed(self, op: Embed, shape: StepShape) -> None:
        out = self._tensor(op.out, shape)
        embed(self._batch.token_ids[: shape.num_tokens], self._weights.matrices[op.table], op.scale, out)

    def _norm(self, op: Norm, shape: StepShape) -> None:
        x, weight = self._tensor(op.x, shape), self._weights.vectors[op.weight]
        out_scale = self._scale(op.out_scale, shape)
        rms_norm(x, weight, op.eps, self._tensor(op.out, shape), group=op.group, out_scale=out_scale)

    def _product(self, op: Product, shape: StepShape) -> None:
        x = self._tensor(op.x, shape)
        if not len(x):
            return
        matrix = self._weights.matrices[op.matrix]
        linear(
            x,
            matrix,
            self._tensor(op.out, shape),
            norm=None if op.norm is None else (self._weights.vectors[op.norm.weight], op.norm.eps),
            bias=self._weights.vectors["+".join(op.bias)] if op.bias else None,
            residual=None if op.residual is None else self._tensor(op.residual, shape),
            activation=op.activation,
            rope_kv=None if op.rope_kv is None else self._epilogue(op.rope_kv, shape),
            x_scale=self._row_scale(op.x_scale, matrix.kind, shape),
            squares=None if op.squares is None else (self._tensor(op.squares, shape), op.eps),
            out_scale=self._row_scale(op.out_scale, matrix.kind, shape),
            next_norm=None if op.next_norm is None else self._next_norm(op.next_norm, shape),
            workspace=self._launching.linear_workspace,
            config=self._launching.linear_config(op.matrix, len(x)),
        )

    def _next_norm(self, op: NextNorm, shape: StepShape) -> ProductsNextNorm:
        weight = self._weights.vectors[op.weight]
        return ProductsNextNorm(weight, self._tensor(op.normed, shape), self._tensor(op.squares, shape))

    def _epilogue(self, op: RopeKv, shape: StepShape) -> RopeKvEpilogue:
        assert op.q is not None
        cache = self.caches[op.layer]
        return RopeKvEpilogue(
            cache.k,
            cache.v,
            self._batch.positions[: shape.num_tokens],
            self._batch.slot_mapping[: shape.num_tokens],
            op.head_dim,
            self._buffers[op.q].shape[1] // op.head_dim,
            self._inv_freq(op),
            op.attention_factor,
            self._vector(op.q_norm),
            self._vector(op.k_norm),
            op.eps,
            cache.k_scale,
            cache.v_scale,
        )

    def _rope_kv(self, op: RopeKv, shape: StepShape) -> None:
        assert op.q is not None
        assert op.k is not None
        assert op.v is not None
        cache = self.caches[op.layer]
        rope_kv(
            self._tensor(op.q, shape),
            self._tensor(op.k, shape),
            self._tensor(op.v, shape),
            cache.k,
            cache.v,
            positions=self._batch.positions[: shape.num_tokens],
            slot_mapping=self._batch.slot_mapping[: shape.num_tokens],
            inv_freq=self._inv_freq(op),
            attention_factor=op.attention_factor,
            head_dim=op.head_dim,
            q_norm=self._vector(op.q_norm),
            k_norm=self._vector(op.k_norm),
            eps=op.eps,
            k_scale=cache.k_scale,
            v_scale=cache.v_scale,
        )

    def _attend(self, op: Attention, shape: StepShape) -> None:
        cache, batch = self.caches[op.layer], self._batch
        heads = (shape.num_tokens, op.num_heads, op.head_dim)
        q, out = self._tensor(op.q, shape).view(heads), self._tensor(op.out, shape).view(heads)
        for call in shape.attention:
            self._launching.attention.module.paged_attention(
                q,
                cache.k,
                cache.v,
                out,
                cu_seqlens_q=batch.cu_seqlens_q[call.begin : call.end + 1],
                seq_lens=batch.seq_lens[call.begin : call.end],
                block_tables=batch.block_tables[call.begin : call.end],
                num_seqs=call.end - call.begin,
                max_query_len=call.max_query_len,
                max_seq_len=call.max_seq_len,
                scale=op.scale,
                window=op.window,
                soft_cap=op.soft_cap,
                k_scale=cache.k_scale,
                v_scale=cache.v_scale,
                workspace=self._launching.attention_workspace,
                config=self._launching.attention_config,
            )

    def _add(self, op: Add, shape: StepShape) -> None:
        add(self._tensor(op.a, shape), self._tensor(op.b, shape), self._tensor(op.out, shape))

    def _gated_activation(self, op: GatedActivation, shape: StepShape) -> None:
        gate, up, out = (self._tensor(name, shape) for name in (op.gate, op.up, op.out))
        gated_activation(gate, up, op.kind, out)

    def _quantize_rows(self, op: QuantizeRows, shape: StepShape) -> None:
        out_scale = self._scale(op.out_scale, shape)
        assert out_scale is not None
        quantize_rows(self._tensor(op.x, shape), self._tensor(op.out, shape), out_scale)

    def _quantize_gated(self, op: QuantizeGated, shape: StepShape) -> None:
        gate, up, out = (self._tensor(name, shape) for name in (op.gate, op.up, op.out))
        gated_activation(gate, up, op.kind, out, out_scale=self._scale(op.out_scale, shape))

    def _select_rows(self, op: SelectRows, shape: StepShape) -> None:
        if not shape.selects_all and shape.num_logits:
            rows = self._batch.logit_rows[: shape.num_logits]
            select(self._tensor(op.x, shape), rows, self._tensor(op.out, shape))

    def _soft_cap(self, op: SoftCap, shape: StepShape) -> None:
        soft_cap(self._tensor(op.x, shape), op.cap)


_RUN: dict[type[GpuOp], Callable[[StepRunner, Any, StepShape], None]] = {
    Embed: StepRunner._embed,
    Norm: StepRunner._norm,
    Product: StepRunner._product,
    RopeKv: StepRunner._rope_kv,
    Attention: StepRunner._attend,
    Add: StepRunner._add,
    GatedActivation: StepRunner._gated_activation,
    QuantizeRows: StepRunner._quantize_rows,
    QuantizeGated: StepRunner._quantize_gated,
    SelectRows: StepRunner._select_rows,
    SoftCap: StepRunner._soft_cap,
}
