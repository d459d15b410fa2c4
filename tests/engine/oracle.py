"""A fake executor whose tokens betray every mistake in the engine's bookkeeping (the KV oracle of the engine tests).

"KV" of a position is the (position, token id) written into its slot. The next token is a hash of all that is read back
THROUGH the block table, so aliased blocks, stale slots, early frees and lost preemption state change the output.
`choose` and `score` say what a sequence must get when it has the machine to itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from headrace.kernels.batch import RowResult, RowSampling, StepBatch

VOCAB = 50
POISON = (-1, 0)
Slots = list[tuple[int, int]]
MISREAD = 255  # what a slot reads as that holds another position


def choose(tokens: list[int], seed: int, banned: tuple[int, ...] = ()) -> int:
    """The model and its sampler: a function of the whole prefix, the seed and nothing else."""
    token = zlib.crc32(bytes(tokens), seed) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def score(tokens: list[int], target: int) -> float:
    """The log-probability of `target` after `tokens`."""
    return -1.0 - zlib.crc32(bytes([*tokens, target])) % 1000


def solo_tokens(prompt: list[int], seed: int, count: int) -> list[int]:
    """The first `count` outputs of a sequence that is alone."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(choose(tokens, seed))
    return tokens[len(prompt) :]


class OracleExecutor:
    """Implements Executor and SwappingExecutor of `headrace.kernels.batch`, and checks that every batch keeps the
    contract of StepBatch.

    fail: called with every batch after its KV was written; may raise, as a broken step would.
    has_nan: called with the sampling of every row of logits; True makes the row NaN, and the KV it came from.
    """

    name = "oracle"

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.block_size = block_size
        self.slots = [POISON] * (num_blocks * block_size)
        self.host_slots = [POISON] * (num_host_blocks * block_size)
        self.num_swapped = 0  # blocks copied, both ways
        self.fail: Callable[[StepBatch], None] = lambda batch: None
        self.has_nan: Callable[[RowSampling], bool] = lambda sampling: False
        self.batches: list[int] = []  # rows of every batch

    def execute(self, batch: StepBatch) -> list[RowResult]:
        self._check(batch)
        size = self.block_size
        positions, slots = batch.positions.tolist(), batch.slot_mapping.tolist()
        starts, lens, tables = batch.cu_seqlens_q.tolist(), batch.seq_lens.tolist(), batch.block_tables.tolist()
        self.batches.append(len(positions))
        for slot, position, token in zip(slots, positions, batch.token_ids.tolist(), strict=True):
            self.slots[slot] = (position, token)
        self.fail(batch)
        results: list[RowResult] = []
        logit_rows = batch.logit_rows.tolist()
        for index, (begin, length, table) in enumerate(zip(starts, lens, tables, strict=False)):
            end = starts[index + 1]
            assert positions[begin:end] == list(range(length - (end - begin), length)), "rows do not end the prefix"
            assert slots[begin:end] == [table[p // size] * size + p % size for p in positions[begin:end]]
            read: list[int] = []
            while len(results) < len(logit_rows) and logit_rows[len(results)] < end:
                row = logit_rows[len(results)]
                self._read(read, table, positions[row] + 1)
                result = self._row(read, batch.sampling[len(results)])
                results.append(result)
                if not result.is_finite:
                    for slot in slots[begin:end]:
                        self.slots[slot] = POISON
        return results

    def swap_out(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        self._copy(self.slots, self.host_slots, blocks, host_blocks)

    def swap_in(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        assert 0 not in blocks, "a swap into the null block"
        self._copy(self.host_slots, self.slots, host_blocks, blocks)

    def _copy(self, source: Slots, target: Slots, sources: Sequence[int], targets: Sequence[int]) -> None:
        assert len(set(sources)) == len(set(targets)) == len(sources) == len(targets), "a swap has a block twice"
        size = self.block_size
        for begin, other in zip(sources, targets, strict=True):
            assert 0 <= other * size < len(target), "a swap to a block that does not exist"
            target[other * size : (other + 1) * size] = source[begin * size : (begin + 1) * size]
            self.num_swapped += 1

    def _check(self, batch: StepBatch) -> None:
        starts, logit_rows = batch.cu_seqlens_q.tolist(), batch.logit_rows.tolist()
        num_rows, num_seqs = len(batch.token_ids), len(batch.seq_lens)
        assert starts[0] == 0, "cu_seqlens_q must start at 0"
        assert starts == sorted(set(starts)), "every sequence of a batch has rows"
        assert starts[-1] == num_rows == len(batch.positions) == len(batch.slot_mapping), "T does not agree"
        assert len(starts) == num_seqs + 1 == len(batch.block_tables) + 1, "B does not agree"
        assert len(batch.sampling) == len(logit_rows), "S does not agree"
        assert logit_rows == sorted(set(logit_rows)), "logit_rows must ascend"
        assert not logit_rows or logit_rows[-1] < num_rows, "logit_rows must be rows of the batch"
        assert batch.slot_mapping.min() >= self.block_size, "a slot of the null block was written"
        assert batch.block_tables.flags.c_contiguous

    def _read(self, read: list[int], table: list[int], length: int) -> None:
        """Extend `read` to the first `length` tokens, as the block table shows them. A stale slot does not raise: it
        changes the output, as it would in a model."""
        size = self.block_size
        for position in range(len(read), length):
            at, token = self.slots[table[position // size] * size + position % size]
            read.append(token if at == position else MISREAD)

    def _row(self, prefix: list[int], sampling: RowSampling) -> RowResult:
        assert sampling.position == len(prefix), "the sampler's counter must be the position of the new token"
        if self.has_nan(sampling):
            return RowResult(0, float("nan"), (), False)
        token = sampling.target if sampling.target >= 0 else choose(prefix, sampling.seed, sampling.banned)
        logprob = score(prefix, token) if sampling.num_logprobs >= 0 else float("nan")
        return RowResult(token, logprob, (), True)
