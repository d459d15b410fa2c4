"""AMD assembly as numbers: registers, spills, matrix instructions, load widths, the main loop. Called by row.py."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_WIDTH = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12}
_WIDTH["dwordx4"] = 16
_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+?)(?:_d16\w*)?\b")
_STORE = re.compile(r"^(?:global|buffer|flat)_(?:store|atomic)_")
_MATRIX = re.compile(r"^v_(?:mfma|smfmac)_\w+")
_INSTRUCTION = re.compile(r"^\s+([a-z]+_\w+)\s*(.*)$")
_LABEL = re.compile(r"^(\.LBB\w+):")


@dataclass(frozen=True)
class Gcn:
    """spills: registers that went to scratch, which is memory; those that went to other registers (scalars to lanes of
    vectors, vectors to accumulation registers) are not among them. stack: bytes of scratch per lane."""

    instructions: tuple[tuple[str, str], ...]
    loops: tuple[tuple[int, int], ...]
    registers: int
    spills: int
    stack: int

    def matrix(self) -> dict[str, int]:
        return dict(Counter(name for name, _ in self.instructions if _MATRIX.match(name)))

    def widths(self) -> dict[int, int]:
        return _widths([name for name, _ in self.instructions])

    def stores(self) -> int:
        """Instructions whose effect others can see."""
        return sum(bool(_STORE.match(name)) for name, _ in self.instructions)

    def main_loop(self) -> tuple[int, int, int]:
        """Matrix instructions, loads and all instructions of the main loop: the one that sass.py's rule names."""
        names = max(self._innermost(), key=_weight, default=[])
        return _matrix(names), _loads(names), len(names)

    def loop_widths(self) -> dict[int, int]:
        """Global loads of the main loop by bytes per lane."""
        return _widths(max(self._innermost(), key=_weight, default=[]))

    def _innermost(self) -> list[list[str]]:
        loops = [
            (first, last)
            for first, last in self.loops
            if not any(o != (first, last) and first <= o[0] and o[1] <= last for o in self.loops)
        ]
        return [[name for name, _ in self.instructions[first:last]] for first, last in loops]


def _matrix(names: list[str]) -> int:
    return sum(bool(_MATRIX.match(name)) for name in names)


def _loads(names: list[str]) -> int:
    return sum(bool(_LOAD.match(name)) for name in names)


def _weight(names: list[str]) -> tuple[int, int, int]:
    matrix = _matrix(names)
    return matrix, _loads(names), -len(names) if matrix else len(names)


def _widths(names: list[str]) -> dict[int, int]:
    kinds = (match.group(1) for name in names if (match := _LOAD.match(name)))
    return dict(Counter(_WIDTH.get(kind, 4) for kind in kinds))


def parse(text: str) -> Gcn:
    instructions: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match.group(1)] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append((match.group(1), match.group(2)))
    loops = []
    for position, (name, operands) in enumerate(instructions):
        if name.startswith(("s_cbranch", "s_branch")):
            start = labels.get(operands.split(";")[0].strip(), position)
            if start < position:
                loops.append((start, position + 1))
    stack = _number("private_segment_fixed_size", text)
    return Gcn(
        tuple(instructions),
        tuple(loops),
        _number("vgpr_count", text),  # the accumulation registers are among them
        _number("vgpr_spill_count", text) + _number("sgpr_spill_count", text) if stack else 0,
        stack,
    )


def _number(name: str, text: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(match.group(1)) if match else 0
