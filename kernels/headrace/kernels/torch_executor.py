"""The reference back end: runs a step program with the torch ops of this package, in float32.

Made by the engine process; the oracle for every later executor. It favours meaning over speed, but copies nothing it
need not: mapped float32 weights are used where they lie, quantised ones are dequantised once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from headrace.kernels import activation, paged_attention
from headrace.kernels.batch import F32, RowResult, StepBatch
from headrace.kernels.embed import embed
from headrace.kernels.linear import linear
from headrace.kernels.paged_attention import AttentionGroup, AttentionShape, plan_attention
from headrace.kernels.program import (
    Add,
    Embed,
    GatedActivation,
    KvWrite,
    Linear,
    Op,
    PagedAttention,
    RmsNorm,
    Rope,
    SelectRows,
    SoftCap,
    StepProgram,
)
from headrace.kernels.quant import QuantTensor, Weight
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rope import RopeTable, rope, rope_table
from headrace.kernels.sample import sample


@dataclass(eq=False)
class _Step:
    """One step under way: the batch as tensors, the activations, and what layers share."""

    batch: StepBatch
    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    logit_rows: torch.Tensor
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: dict[AttentionShape, list[AttentionGroup]] = field(default_factory=dict)
    rope_tables: dict[tuple[int, float], RopeTable] = field(default_factory=dict)


class TorchExecutor:
    """Implements `headrace.kernels.batch.Executor`.

    weights: one per `program.weights`, of that shape; ValueError otherwise. num_blocks, block_size: the KV blocks,
    whose memory (float32) is taken from the system when it is first written. num_threads: torch's intra-op threads,
    which are global to the process; None leaves them alone.
    """

    def __init__(
        self,
        program: StepProgram,
        weights: Mapping[str, Weight],
        *,
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
        device: str = "cpu",
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._program = program
        self._device = torch.device(device)
        self._block_size = block_size
        self._zero_slot = num_blocks * block_size  # first slot of one block more, which stays zero
        self._weights = self._load_weights(weights)
        shapes = [(num_blocks + 1, block_size, layer.num_kv_heads, layer.head_dim) for layer in program.kv]
        self._keys = [self._zeros(shape) for shape in shapes]
        self._values = [self._zeros(shape) for shape in shapes]
        self._inv_freqs = {
            id(op.inv_freq): torch.tensor(op.inv_freq, dtype=torch.float32, device=self._device)
            for op in program.ops
            if isinstance(op, Rope)
        }
        self._ops = [(_RUN[type(op)], op) for op in program.ops]

    @property
    def name(self) -> str:
        return f"torch-{self._device.type}"

    def execute(self, batch: StepBatch) -> list[RowResult]:
        """Run one step; one result per row of batch.logit_rows."""
        return sample(self.forward(batch), batch.sampling)

    def forward(self, batch: StepBatch) -> F32:
        """Run the step program alone: the logits, float32 [S, vocab_size], and the batch's keys and values written."""
        with torch.inference_mode():
            step = _Step(
                batch,
                self._tensor(batch.token_ids).long(),
                self._tensor(batch.positions).float(),
                self._tensor(batch.slot_mapping).long(),
                self._tensor(batch.logit_rows).long(),
            )
            for run, op in self._ops:
                run(self, op, step)
            logits: F32 = step.buffers[self._program.logits].cpu().numpy()
        return logits

    def _load_weights(self, weights: Mapping[str, Weight]) -> dict[str, torch.Tensor]:
        tensors = {}
        for spec in self._program.weights:
            weight = weights.get(spec.name)
            if weight is None or weight.shape != spec.shape:
                raise ValueError(
                    f"weight {spec.name}: want {spec.shape}, have {None if weight is None else weight.shape}"
                )
            dense = weight.dequantize() if isinstance(weight, QuantTensor) else weight.astype(np.float32, copy=False)
            tensors[spec.name] = self._tensor(dense)
        return tensors

    def _tensor(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        with warnings.catch_warnings():
            # Mapped weights are read-only, and nothing here writes to a weight.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array).to(self._device)

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        if self._device.type == "cpu":
            return torch.from_numpy(np.zeros(shape, np.float32))  # calloc: untouched pages cost nothing
        return torch.zeros(shape, dtype=torch.float32, device=self._device)

    def _embed(self, op: Embed, step: _Step) -> None:
        step.buffers[op.out] = embed(step.token_ids, self._weights[op.table], op.scale)

    def _rms_norm(self, op: RmsNorm, step: _Step) -> None:
        step.buffers[op.out] = rms_norm(step.buffers[op.x], self._weights[op.weight], op.eps)

    def _linear(self, op: Linear, step: _Step) -> None:
        bias = None if op.bias is None else self._weights[op.bias]
        step.buffers[op.out] = linear(step.buffers[op.x], self._weights[op.weight], bias)

    def _add(self, op: Add, step: _Step) -> None:
        step.buffers[op.out] = step.buffers[op.a] + step.buffers[op.b]

    def _gated_activation(self, op: GatedActivation, step: _Step) -> None:
        step.buffers[op.out] = activation.gated_activation(step.buffers[op.gate], step.buffers[op.up], op.kind)

    def _rope(self, op: Rope, step: _Step) -> None:
        key = (id(op.inv_freq), op.attention_factor)
        table = step.rope_tables.get(key)
        if table is None:
            table = rope_table(step.positions, self._inv_freqs[key[0]], op.attention_factor)
            step.rope_tables[key] = table
        step.buffers[op.x] = rope(step.buffers[op.x], table)

    def _kv_write(self, op: KvWrite, step: _Step) -> None:
        paged_attention.kv_write(self._keys[op.layer], step.buffers[op.k], step.slot_mapping)
        paged_attention.kv_write(self._values[op.layer], step.buffers[op.v], step.slot_mapping)

    def _paged_attention(self, op: PagedAttention, step: _Step) -> None:
        shape = AttentionShape(op.num_heads, op.num_kv_heads, op.window, self._block_size, self._zero_slot)
        groups = step.groups.get(shape)
        if groups is None:
            groups = step.groups[shape] = plan_attention(step.batch, shape, self._device)
        keys, values = self._keys[op.layer], self._values[op.layer]
        step.buffers[op.out] = paged_attention.paged_attention(
            step.buffers[op.q], keys, values, groups, op.scale, op.soft_cap
        )

    def _select_rows(self, op: SelectRows, step: _Step) -> None:
        step.buffers[op.out] = step.buffers[op.x].index_select(0, step.logit_rows)

    def _soft_cap(self, op: SoftCap, step: _Step) -> None:
        activation.soft_cap(step.buffers[op.x], op.cap)


_Run = Callable[[TorchExecutor, Any, _Step], None]
_RUN: dict[type[Op], _Run] = {
    Embed: TorchExecutor._embed,
    RmsNorm: TorchExecutor._rms_norm,
    Linear: TorchExecutor._linear,
    Add: TorchExecutor._add,
    GatedActivation: TorchExecutor._gated_activation,
    Rope: TorchExecutor._rope,
    KvWrite: TorchExecutor._kv_write,
    PagedAttention: TorchExecutor._paged_attention,
    SelectRows: TorchExecutor._select_rows,
    SoftCap: TorchExecutor._soft_cap,
}
