"""Drive an executor by hand, without the engine: whole token lists in, logits of every row out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.torch_executor import TorchExecutor


def step_batch(
    pieces: Sequence[tuple[Sequence[int], int, Sequence[int]]], block_size: int, *, last_only: bool = False
) -> StepBatch:
    """One step of several sequences, each (new token ids, position of the first, block table).

    Logits are wanted of every row, or of the last of each sequence.
    """
    lengths = [len(tokens) for tokens, _, _ in pieces]
    positions = [np.arange(start, start + len(tokens)) for tokens, start, _ in pieces]
    tables = np.zeros((len(pieces), max(len(table) for _, _, table in pieces)), np.int32)
    for row, (_, _, table) in zip(tables, pieces, strict=True):
        row[: len(table)] = table
    slots = [table[p // block_size] * block_size + p % block_size for table, p in zip(tables, positions, strict=True)]
    offsets = np.cumsum([0, *lengths])
    logit_rows = offsets[1:] - 1 if last_only else np.arange(offsets[-1])
    return StepBatch(
        token_ids=np.concatenate([np.asarray(tokens, np.int32) for tokens, _, _ in pieces]),
        positions=np.concatenate(positions).astype(np.int32),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        cu_seqlens_q=offsets.astype(np.int32),
        seq_lens=np.array([start + len(tokens) for tokens, start, _ in pieces], np.int32),
        block_tables=tables,
        logit_rows=logit_rows.astype(np.int32),
        sampling=(RowSampling(),) * len(logit_rows),
    )


def logits_in_chunks(
    executor: TorchExecutor, token_ids: Sequence[int], chunk: int, table: Sequence[int], block_size: int
) -> np.ndarray:
    """Logits after every token, float32 [tokens, vocabulary], computed `chunk` tokens a step."""
    return np.concatenate(
        [
            executor.forward(step_batch([(token_ids[start : start + chunk], start, table)], block_size))
            for start in range(0, len(token_ids), chunk)
        ]
    )
