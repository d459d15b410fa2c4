"""What rewrites of a list of ops need: where the names of its buffers lie, what happens to them later on, and a walk
that puts new ops in the place of old ones. Called by `native/fuse.py` and `gpu/lower.py`, which have ops of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

OpT = TypeVar("OpT")


class NamedBuffer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def width(self) -> int: ...


class NamedView(NamedBuffer, Protocol):
    @property
    def buffer(self) -> str: ...
    @property
    def column(self) -> int: ...


@dataclass(frozen=True)
class Columns:
    """Columns [begin, end) of a buffer."""

    buffer: str
    begin: int
    end: int

    def overlaps(self, other: Columns) -> bool:
        return self.buffer == other.buffer and self.begin < other.end and other.begin < self.end

    def holds(self, other: Columns) -> bool:
        return self.buffer == other.buffer and self.begin <= other.begin and other.end <= self.end


class Names(Generic[OpT]):
    """Resolves the names of one program. reads, writes: names of the buffers that an op reads and writes. logits: the
    buffer that is wanted after the last op."""

    def __init__(
        self,
        buffers: Iterable[NamedBuffer],
        views: Iterable[NamedView],
        ops: Sequence[OpT],
        reads: Callable[[OpT], tuple[str, ...]],
        writes: Callable[[OpT], tuple[str, ...]],
        logits: str,
    ) -> None:
        self._ops, self._reads, self._writes, self._logits = ops, reads, writes, logits
        self._columns = {buffer.name: Columns(buffer.name, 0, buffer.width) for buffer in buffers}
        self._columns |= {v.name: Columns(v.buffer, v.column, v.column + v.width) for v in views}

    def columns(self, name: str) -> Columns:
        return self._columns[name]

    def width(self, name: str) -> int:
        columns = self._columns[name]
        return columns.end - columns.begin

    def overlap(self, a: str, b: str) -> bool:
        """Whether two names share memory."""
        return self._columns[a].overlaps(self._columns[b])

    def is_dead(self, name: str, index: int) -> bool:
        """Whether nobody reads `name` at or after op `index` before all of it is written anew."""
        for op in self._ops[index:]:
            if any(self.overlap(name, other) for other in self._reads(op)):
                return False
            if any(self._columns[other].holds(self._columns[name]) for other in self._writes(op)):
                return True
        return not self.overlap(name, self._logits)


def replace_ops(
    ops: Sequence[OpT], match: Callable[[Sequence[OpT], int], tuple[Sequence[OpT], int] | None]
) -> tuple[OpT, ...]:
    """Go through the ops; where `match(ops, i)` gives (new ops, n), they take the place of the n ops from i on."""
    replaced: list[OpT] = []
    index = 0
    while index < len(ops):
        found = match(ops, index)
        if found is None:
            replaced.append(ops[index])
            index += 1
        else:
            replaced += found[0]
            index += found[1]
    return tuple(replaced)
