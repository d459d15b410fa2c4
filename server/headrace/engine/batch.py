"""Turns a StepPlan into the numpy arrays of a StepBatch. Called by `engine.Engine` once per step (and per retry).

All arrays are allocated once. Block tables are kept between steps: a row is rewritten only where another sequence
stands in it, else only its new blocks are written. A whole engine step without its executor takes 0.08 ms of one core
at 16 running decodes and 0.32 ms at 64 (Python 3.11; about 40 % of it here, 30 % in `Scheduler.update`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
from headrace.engine.config import EngineConfig
from headrace.engine.scheduler import ScheduledSequence
from headrace.engine.sequence import Sequence
from headrace.kernels.batch import RowSampling, StepBatch


class BatchBuilder:
    """Builds one batch at a time: a batch's arrays are valid until the next call of `build`."""

    def __init__(self, config: EngineConfig) -> None:
        self._block_size = config.block_size
        most_blocks = -(-config.max_sequence_len // config.block_size)
        self._token_ids = np.zeros(config.max_num_batched_tokens, np.int32)
        self._positions = np.zeros(config.max_num_batched_tokens, np.int32)
        self._slot_mapping = np.zeros(config.max_num_batched_tokens, np.int32)
        self._cu_seqlens_q = np.zeros(config.max_num_seqs + 1, np.int32)
        self._seq_lens = np.zeros(config.max_num_seqs, np.int32)
        self._logit_rows = np.zeros(config.max_logit_rows, np.int32)
        self._block_tables = np.zeros((config.max_num_seqs, most_blocks), np.int32)
        self._rows: list[list[int]] = [[] for _ in range(config.max_num_seqs)]  # the table that stands in each row
        self._row_lens = [0] * config.max_num_seqs  # blocks written in each row
        self._counting = np.arange(config.max_sequence_len, dtype=np.int32)

    def build(self, items: Seq[ScheduledSequence]) -> StepBatch:
        """The batch of `items`, in order. Block tables are contiguous and as wide as the longest needs."""
        size = self._block_size
        cu_seqlens, seq_lens, logit_rows = [0], [], []
        sampling: list[RowSampling] = []
        end = width = 0
        for row, item in enumerate(items):
            seq, first, stop = item.seq, item.start, item.start + item.num_tokens
            table = seq.block_table
            self._write_table(row, table)
            begin, end = end, end + item.num_tokens
            if item.num_tokens == 1:
                self._token_ids[begin] = _token(seq, first)
                self._positions[begin] = first
                self._slot_mapping[begin] = table[first // size] * size + first % size
            else:
                positions = self._counting[first:stop]
                self._token_ids[begin:end] = _tokens(seq, first, stop)
                self._positions[begin:end] = positions
                self._slot_mapping[begin:end] = self._block_tables[row, positions // size] * size + positions % size
            cu_seqlens.append(end)
            seq_lens.append(stop)
            width = max(width, -(-stop // size))
            for position in range(stop - item.num_logits, stop):
                logit_rows.append(end - stop + position)
                sampling.append(row_sampling(seq, position))
        num_seqs, num_logits = len(seq_lens), len(logit_rows)
        self._cu_seqlens_q[: num_seqs + 1] = cu_seqlens
        self._seq_lens[:num_seqs] = seq_lens
        self._logit_rows[:num_logits] = logit_rows
        return StepBatch(
            token_ids=self._token_ids[:end],
            positions=self._positions[:end],
            slot_mapping=self._slot_mapping[:end],
            cu_seqlens_q=self._cu_seqlens_q[: num_seqs + 1],
            seq_lens=self._seq_lens[:num_seqs],
            block_tables=np.ascontiguousarray(self._block_tables[:num_seqs, :width]),
            logit_rows=self._logit_rows[:num_logits],
            sampling=tuple(sampling),
        )

    def _write_table(self, row: int, table: list[int]) -> None:
        """Tables only ever grow, and a new list takes the place of a released one: the same list is the same prefix."""
        length, written = len(table), self._row_lens[row]
        if self._rows[row] is not table:
            self._rows[row] = table
            self._block_tables[row, :length] = table
            self._block_tables[row, length:written] = 0
        elif written < length:
            self._block_tables[row, written:length] = table[written:]
        self._row_lens[row] = length


def _token(seq: Sequence, position: int) -> int:
    """The token there, or -1 - i: whatever result i of the step in flight is (`PipelinedExecutor`)."""
    return seq.tokens[position] if position < len(seq.tokens) else -1 - seq.pending_row


def _tokens(seq: Sequence, first: int, stop: int) -> list[int]:
    tokens = seq.tokens[first:stop]
    return tokens if len(tokens) == stop - first else [*tokens, -1 - seq.pending_row]


def row_sampling(seq: Sequence, position: int) -> RowSampling:
    """How to treat the logits of the token at `position` (0-based), which choose the token at position + 1."""
    params = seq.sampling
    if seq.is_score:
        return RowSampling(
            target=seq.tokens[position + 1],
            seed=params.seed,
            position=position + 1,
            num_logprobs=max(0, params.num_logprobs),
        )
    has_repetition = params.repetition_penalty != 1.0
    has_penalty = has_repetition or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
    return RowSampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=seq.logit_bias,
        banned=params.stop_token_ids if len(seq.outputs) + seq.has_pending < params.min_tokens else (),
        seed=params.seed,
        position=position + 1,
        num_logprobs=params.num_logprobs,
        prompt_ids=seq.prompt if has_repetition else (),
        output_ids=seq.outputs if has_penalty else (),
    )
