"""AMD assembly as numbers: registers, spills, matrix instructions, load widths, the main loop. Called by row.py."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_WIDTH = {"ubyte": 1, "sbyte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12}
_WIDTH["dwordx4"] = 16
_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(\w+?)(?:_d16\w*)?\b")
_MATRIX = re.compile(r"^v_(?:mfma|smfmac)_\w+")
_INSTRUCTION = re.compile(r"^\s+([a-z]+_\w+)\s*(.*)$")
_LABEL = re.compile(r"^(\.LBB\w+):")


@dataclass(frozen=True)
class Gcn:
    """spills: vector and scalar registers that went to scratch. stack: bytes of scratch per lane."""

    instructions: tuple[tuple[str, str], ...]
    loops: tuple[tuple[int, int], ...]
    registers: int
    spills: int
    stack: int

    def matrix(self) -> dict[str, int]:
        return dict(Counter(name for name, _ in self.instructions if _MATRIX.match(name)))

    def widths(self) -> dict[int, int]:
        kinds = (match.group(1) for name, _ in self.instructions if (match := _LOAD.match(name)))
        return dict(Counter(_WIDTH.get(kind, 4) for kind in kinds))

    def main_loop(self) -> int:
        """Instructions of the innermost loop with most matrix instructions, then loads, then length; 0: no loop."""
        best: tuple[int, int, int] = (-1, -1, 0)
        for first, last in self.loops:
            if any(other != (first, last) and first <= other[0] and other[1] <= last for other in self.loops):
                continue
            names = [name for name, _ in self.instructions[first:last]]
            weight = (sum(bool(_MATRIX.match(n)) for n in names), sum(bool(_LOAD.match(n)) for n in names), len(names))
            best = max(best, weight)
        return best[2]


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
    return Gcn(
        tuple(instructions),
        tuple(loops),
        _number("vgpr_count", text),  # the accumulation registers are among them
        _number("vgpr_spill_count", text) + _number("sgpr_spill_count", text),
        _number("private_segment_fixed_size", text),
    )


def _number(name: str, text: str) -> int:
    match = re.search(rf"\.{name}:\s+(\d+)", text)
    return int(match.group(1)) if match else 0
