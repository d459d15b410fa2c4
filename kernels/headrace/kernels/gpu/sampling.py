"""Sampling on the device, as the executor uses it: parameters travel with the batch, tokens stay, results come back in
one copy. The arithmetic is `headrace.kernels.sample`'s. Called by `executor.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from headrace.kernels.batch import I32, RowResult, RowSampling
from headrace.kernels.gpu.staging import NUM_SLOTS
from headrace.kernels.sample import device as sampling
from headrace.kernels.sample.device import DeviceSampling, DeviceTokens, PackedSampling
from headrace.kernels.sample.triton import sample, workspace_bytes

_USUAL_ENTRIES = 1024  # tokens whose logits change (biases, penalties), in the batch's copy; more go by themselves


class Sampler:
    """Owns parameters, tokens and their host copies. sampled: int32 [max_rows], the tokens of the step before, which
    the next one may start from; a buffer of its own, as rows look at it while others are being sampled."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self.num_words = sampling.words_for(max_rows, _USUAL_ENTRIES)
        size = DeviceTokens.words_for(max_rows)
        self._device = device
        self._words = torch.zeros(size, dtype=torch.int32, device=device)
        self.sampled = torch.zeros(max_rows, dtype=torch.int32, device=device)
        is_pinned = device.type == "cuda"
        host = "meta" if device.type == "meta" else "cpu"
        self._results = [
            torch.zeros(size, dtype=torch.int32, device=host, pin_memory=is_pinned) for _ in range(NUM_SLOTS)
        ]
        self._vocab_size = vocab_size
        self._workspace = self._make_workspace(max_rows, _USUAL_ENTRIES)
        self._packed: PackedSampling | None = None
        self._overflow: list[torch.Tensor | None] = [None] * NUM_SLOTS
        self._extra = torch.empty(0, dtype=torch.int32)

    def attach(self, extra: torch.Tensor) -> None:
        """Where the batch's copy puts our words on the device."""
        self._extra = extra

    def encode(self, rows: Sequence[RowSampling], pending: Sequence[int], words: I32) -> None:
        """Write the parameters of the next step into the host's part of the batch. pending: for each row the result of
        the step before that is its newest token, or -1."""
        self._packed = sampling.pack_sampling(rows, pending) if rows else None
        if self._packed is not None and len(self._packed.words) <= len(words):
            words[: len(self._packed.words)] = self._packed.words

    def launch(self, logits: torch.Tensor, slot: int) -> None:
        """Sample the rows that were encoded last and queue the copy of the results to the host buffer `slot`."""
        assert self._packed is not None
        tokens = DeviceTokens.of(self._words, self._packed.num_rows)
        workspace = self._workspace
        if self._packed.num_entries > _USUAL_ENTRIES:
            workspace = self._make_workspace(self._packed.num_rows, self._packed.num_entries)
        sample(logits, self._parameters(self._packed, slot), tokens, workspace, previous=self.sampled)
        self.sampled[: self._packed.num_rows].copy_(tokens.token_ids)
        size = len(tokens.words)
        self._results[slot][:size].copy_(self._words[:size], non_blocking=True)

    def decode(self, slot: int, rows: Sequence[RowSampling]) -> list[RowResult]:
        """The results of a step that is done."""
        return sampling.results(DeviceTokens.of(self._results[slot], len(rows)), rows) if rows else []

    def _make_workspace(self, num_rows: int, num_entries: int) -> torch.Tensor:
        size = workspace_bytes(num_rows, self._vocab_size, num_entries)
        return torch.zeros(size, dtype=torch.uint8, device=self._device)

    def _parameters(self, packed: PackedSampling, slot: int) -> DeviceSampling:
        size = len(packed.words)
        if size > len(self._extra):  # whole prompts under a repetition penalty
            staging = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            self._overflow[slot] = staging  # until the step of this slot is collected
            return sampling.upload(packed, staging, torch.empty(size, dtype=torch.int32, device=self._device))
        split = sampling.words_for(packed.num_rows, 0)
        return DeviceSampling(
            self._extra[:split].view(packed.num_rows, -1),
            self._extra[split:size].view(packed.num_entries, sampling.ENTRY_WORDS),
            packed.num_top,
            packed.has_select,
            packed.has_pending,
        )
