"""Logits of a whole token list by one of our executors, without the engine. Called by drive_headrace.py, quality.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from headrace.kernels.batch import RowSampling, StepBatch

_CHUNK = 128  # tokens a step, each of whose rows wants logits


class _Forward(Protocol):
    def forward(self, batch: StepBatch) -> npt.NDArray[np.float32]: ...


def window_logits(executor: _Forward, tokens: Sequence[int], block_size: int = 16) -> npt.NDArray[np.float32]:
    """float32 [tokens, vocabulary]: row i is what the executor predicts after token i. Uses the KV blocks from 1 on."""
    table = np.arange(1, 2 + len(tokens) // block_size, dtype=np.int32)
    parts = []
    for start in range(0, len(tokens), _CHUNK):
        ids = np.asarray(tokens[start : start + _CHUNK], np.int32)
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        batch = StepBatch(
            token_ids=ids,
            positions=positions,
            slot_mapping=(table[positions // block_size] * block_size + positions % block_size).astype(np.int32),
            cu_seqlens_q=np.array([0, len(ids)], np.int32),
            seq_lens=np.array([start + len(ids)], np.int32),
            block_tables=table[None],
            logit_rows=np.arange(len(ids), dtype=np.int32),
            sampling=(RowSampling(),) * len(ids),
        )
        parts.append(np.array(executor.forward(batch)))
    return np.concatenate(parts)
