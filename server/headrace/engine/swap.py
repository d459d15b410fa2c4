"""Where the KV of preempted sequences waits: blocks of host memory, for executors that can copy blocks there and back.

Used by the scheduler, which decides. The copies are data in the step plan; the executor runs them in the order in which
they were decided, after all steps before and ahead of the plan's own (`headrace.kernels.batch.SwappingExecutor`). So a
host block may be handed out again at once: whoever writes to it comes later. docs/decisions/0008 says when swapping is
worth it.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.engine.config import EngineConfig
from headrace.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Swap:
    """blocks[i] is copied to host_blocks[i], or with `is_in` the other way."""

    is_in: bool
    blocks: tuple[int, ...]
    host_blocks: tuple[int, ...]


class HostPool:
    """Host blocks 0 .. num_host_blocks - 1, each free or in one sequence's `host_table`."""

    def __init__(self, config: EngineConfig) -> None:
        self.block_size = config.block_size
        self._min_tokens = config.min_swap_tokens
        self.num_blocks = config.num_host_blocks
        self.free = list(range(self.num_blocks - 1, -1, -1))  # a stack; low numbers first
        self.num_swapped_out = 0  # preemptions that kept their KV
        self.decided: list[Swap] = []

    def take(self, seq: Sequence) -> None:
        """Keep the KV of a sequence that is about to lose its blocks, if that is worth it and there is room; else it
        will be computed again."""
        count = -(-seq.num_computed // self.block_size)
        if not count or seq.num_computed < self._min_tokens or count > len(self.free):
            return
        seq.host_table = [self.free.pop() for _ in range(count)]
        seq.num_swapped = seq.num_computed
        self.num_swapped_out += 1
        self.decided.append(Swap(False, tuple(seq.block_table[:count]), tuple(seq.host_table)))

    def bring_back(self, seq: Sequence) -> None:
        """Fill the new blocks of a sequence that has a table again, from where its prefix hit ends."""
        begin = seq.num_computed // self.block_size  # a hit is whole blocks
        if begin < len(seq.host_table):
            blocks = seq.block_table[begin : len(seq.host_table)]
            self.decided.append(Swap(True, tuple(blocks), tuple(seq.host_table[begin:])))
            seq.num_computed = seq.num_swapped
        self.drop(seq)

    def drop(self, seq: Sequence) -> None:
        """Give a sequence's host blocks back."""
        self.free.extend(reversed(seq.host_table))
        seq.host_table = []
        seq.num_swapped = 0

    def take_decided(self) -> tuple[Swap, ...]:
        """What was decided since the last call, in order."""
        decided, self.decided = tuple(self.decided), []
        return decided
