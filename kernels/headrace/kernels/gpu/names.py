"""Where the names of a GpuProgram lie, and what happens to them later on. Used by the rewrites of `lower.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from headrace.kernels.gpu.ops import GpuOp, GpuProgram, reads, writes


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


class Names:
    """Resolves the names of one program."""

    def __init__(self, program: GpuProgram) -> None:
        self._program = program
        self._columns = {buffer.name: Columns(buffer.name, 0, buffer.width) for buffer in program.buffers}
        self._columns |= {v.name: Columns(v.buffer, v.column, v.column + v.width) for v in program.views}

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
        for op in self._program.ops[index:]:
            if any(self.overlap(name, other) for other in reads(op)):
                return False
            if any(self._columns[other].holds(self._columns[name]) for other in writes(op)):
                return True
        return not self.overlap(name, self._program.logits)


Match = Callable[[Sequence[GpuOp], int], "tuple[Sequence[GpuOp], int] | None"]


def replace_ops(program: GpuProgram, match: Match) -> GpuProgram:
    """Go through the ops; where `match(ops, i)` gives (new ops, n), they take the place of the n ops from i on."""
    ops: list[GpuOp] = []
    index = 0
    while index < len(program.ops):
        found = match(program.ops, index)
        if found is None:
            ops.append(program.ops[index])
            index += 1
        else:
            ops += found[0]
            index += found[1]
    return replace(program, ops=tuple(ops))
