"""The host's numbers of a step: the most it may hold, how many rows it has, how attention is called on them.

Made by `executor.py` from a batch; a captured graph is made for one such shape and replayed for all batches that fit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from headrace.kernels.batch import StepBatch


@dataclass(frozen=True)
class StepLimits:
    """The most that a step may hold, and the KV block. max_model_len bounds block tables and workspaces."""

    max_tokens: int
    max_seqs: int
    max_logit_rows: int
    max_model_len: int
    block_size: int

    @property
    def table_width(self) -> int:
        return -(-self.max_model_len // self.block_size)

    def check(self, batch: StepBatch) -> None:
        """Raise ValueError where a batch does not fit, before anything is launched."""
        sizes = (
            ("tokens", len(batch.token_ids), self.max_tokens),
            ("sequences", len(batch.seq_lens), self.max_seqs),
            ("rows of logits", len(batch.logit_rows), self.max_logit_rows),
            ("blocks of a sequence", batch.block_tables.shape[1], self.table_width),
        )
        for what, count, most in sizes:
            if count > most:
                raise ValueError(f"a step of {count} {what}; this executor takes {most}")
        if len(batch.sampling) != len(batch.logit_rows):
            raise ValueError(f"{len(batch.logit_rows)} rows of logits, {len(batch.sampling)} to sample")


@dataclass(frozen=True)
class AttentionCall:
    """Sequences [begin, end) of the batch, and upper bounds over them."""

    begin: int
    end: int
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class StepShape:
    """num_logits = num_tokens: every row's logits are wanted, so nothing has to be selected."""

    num_tokens: int
    num_seqs: int
    num_logits: int
    attention: tuple[AttentionCall, ...]

    @property
    def selects_all(self) -> bool:
        return self.num_logits == self.num_tokens


Fits = Callable[[int, int, int], bool]  # (sequences, longest query, longest sequence) -> the workspace is enough


def decode_shape(num_seqs: int, max_seq_len: int, fits: Fits) -> StepShape:
    """A step of one row for each of `num_seqs` sequences; attention is called once if the workspace is enough."""
    share = num_seqs
    while share > 1 and not fits(share, 1, max_seq_len):
        share = (share + 1) // 2
    begins = range(0, num_seqs, share)
    calls = tuple(AttentionCall(begin, min(begin + share, num_seqs), 1, max_seq_len) for begin in begins)
    return StepShape(num_seqs, num_seqs, num_seqs, calls)


def shape_of(batch: StepBatch, fits: Fits) -> StepShape:
    """The shape of a batch. Neighbouring sequences share a call of attention as long as they are all decode rows or
    none is, and the workspace is enough for them; a row's bits do not depend on who shares its call."""
    query_lens = np.diff(batch.cu_seqlens_q).tolist()
    seq_lens = batch.seq_lens.tolist()
    calls: list[AttentionCall] = []
    begin = 0
    for index in range(1, len(seq_lens) + 1):
        is_end = index == len(seq_lens)
        if not is_end and (query_lens[index] == 1) == (query_lens[begin] == 1):
            longest, last = max(query_lens[begin : index + 1]), max(seq_lens[begin : index + 1])
            if fits(index + 1 - begin, longest, last):
                continue
        calls.append(AttentionCall(begin, index, max(query_lens[begin:index]), max(seq_lens[begin:index])))
        begin = index
    return StepShape(len(batch.token_ids), len(seq_lens), len(batch.logit_rows), tuple(calls))


def ladder(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that decode graphs are captured for: 1, 2, 4, 8, 16, then every 16 to 128, then every 64."""
    sizes = [1, 2, 4, 8, *range(16, 129, 16), *range(192, 4097, 64)]
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)
