"""The batch on its way to the device: all its arrays in one pinned buffer, one copy a step.

Filled and sent by `executor.py`. The arrays lie at fixed places of one int32 buffer, block tables last, so that a step
copies a prefix and a captured graph finds everything where it was. Two host buffers take turns: the one of the step in
flight must not change before its copy has run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from headrace.kernels.batch import I32, StepBatch
from headrace.kernels.gpu.shape import StepLimits

_ALIGN = 4  # int32: sections start on 16 bytes
NUM_SLOTS = 2


@dataclass(frozen=True, eq=False)
class DeviceBatch:
    """The arrays of `headrace.kernels.batch.StepBatch` on the device, int32, as long as a step may be.

    block_tables: [max_seqs, table_width]. extra: words for whoever asked for them (sampling parameters).
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    logit_rows: torch.Tensor
    extra: torch.Tensor
    block_tables: torch.Tensor


class Staging:
    """Owns the device's copy of the batch and the two host buffers."""

    def __init__(self, limits: StepLimits, device: torch.device, num_extra: int = 0) -> None:
        """num_extra: int32 words that travel with the batch, between logit_rows and block_tables."""
        self._limits = limits
        sizes = {
            "token_ids": limits.max_tokens,
            "positions": limits.max_tokens,
            "slot_mapping": limits.max_tokens,
            "cu_seqlens_q": limits.max_seqs + 1,
            "seq_lens": limits.max_seqs,
            "logit_rows": limits.max_logit_rows,
            "extra": num_extra,
            "block_tables": limits.max_seqs * limits.table_width,
        }
        self._offsets: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self._offsets[name] = slice(end, end + size)
            end += -(-size // _ALIGN) * _ALIGN
        self._device = torch.zeros(end, dtype=torch.int32, device=device)
        is_pinned = device.type == "cuda"
        self._pinned = [torch.zeros(end, dtype=torch.int32, pin_memory=is_pinned) for _ in range(NUM_SLOTS)]
        self._hosts: list[I32] = [tensor.numpy() for tensor in self._pinned]
        self._slot = 0
        parts = {name: self._device[where] for name, where in self._offsets.items()}
        parts["block_tables"] = parts["block_tables"].view(limits.max_seqs, limits.table_width)
        self.batch = DeviceBatch(**parts)

    @property
    def slot(self) -> int:
        """Which of the host buffers the last `fill` took; results use the buffer of the same number."""
        return self._slot

    def fill(self, batch: StepBatch, *, num_seqs: int, null_block: int) -> None:
        """Write a batch into the next host buffer, padded to `num_seqs` sequences of one row each.

        A padding row is token 0 at position 0 of the null block, which belongs to nobody and may hold anything finite.
        """
        self._slot = (self._slot + 1) % NUM_SLOTS
        real, padding = len(batch.seq_lens), num_seqs - len(batch.seq_lens)
        tokens = len(batch.token_ids)
        self._put("token_ids", batch.token_ids, padding, 0)
        self._put("positions", batch.positions, padding, 0)
        self._put("slot_mapping", batch.slot_mapping, padding, null_block * self._limits.block_size)
        self._put("cu_seqlens_q", batch.cu_seqlens_q, 0, 0)
        self._put("seq_lens", batch.seq_lens, padding, 1)
        self._put("logit_rows", batch.logit_rows, 0, 0)
        table = self._section("block_tables").reshape(self._limits.max_seqs, -1)
        table[:real, : batch.block_tables.shape[1]] = batch.block_tables
        if padding:
            self._section("cu_seqlens_q")[real + 1 : num_seqs + 1] = np.arange(tokens + 1, tokens + padding + 1)
            self._section("logit_rows")[len(batch.logit_rows) : num_seqs] = np.arange(tokens, tokens + padding)
            table[real:num_seqs, 0] = null_block

    def extra(self) -> I32:
        """The extra words of the host buffer that was filled last."""
        return self._section("extra")

    def send(self, num_seqs: int) -> None:
        """Queue the copy to the device: everything up to the last block table in use."""
        end = self._offsets["block_tables"].start + num_seqs * self._limits.table_width
        self._device[:end].copy_(self._pinned[self._slot][:end], non_blocking=True)

    def _section(self, name: str) -> I32:
        return self._hosts[self._slot][self._offsets[name]]

    def _put(self, name: str, values: npt.NDArray[np.int32], padding: int, filler: int) -> None:
        section = self._section(name)
        section[: len(values)] = values
        section[len(values) : len(values) + padding] = filler
