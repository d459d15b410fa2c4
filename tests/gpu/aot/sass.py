"""NVIDIA machine code as numbers: instructions by kind and width, the main loop, registers, stack. Called by row.py.

Uses nvdisasm and cuobjdump, which Triton's wheel brings.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Matrix instructions: warp (HMMA, IMMA, QMMA: 8-bit floats), warp group (sm_90: ...GMMA), tcgen05 (sm_100: UTC...).
MATRIX = (
    "HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA",
)  # fmt: skip
LOADS = ("LDG", "LDGSTS")  # LDGSTS: cp.async, straight to shared memory
BULK = ("UTMALDG", "UTMASTG", "UBLKCP")  # TMA: widths are in the descriptor
STORES = ("STG", "ST", "RED", "REDG", "ATOM", "ATOMG", "UTMASTG", "UTMAREDG")  # what others can see of a kernel
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"(\.L_\w+)")


@dataclass(frozen=True)
class Instruction:
    name: str  # with its modifiers: "LDG.E.128.CONSTANT"
    operands: str

    @property
    def base(self) -> str:
        return self.name.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes per thread of a load or store."""
        parts = self.name.split(".")
        for suffix, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if suffix in parts:
                return size
        return 4


@dataclass(frozen=True)
class Loop:
    first: int
    last: int  # one past the branch back


@dataclass(frozen=True)
class Sass:
    """A disassembled kernel. registers per thread; stack: bytes of local memory per thread (spills among them)."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    registers: int
    stack: int

    def count(self, names: Sequence[str]) -> int:
        return sum(item.base in names for item in self.instructions)

    def matrix(self) -> dict[str, int]:
        """Matrix instructions by name and shape: {"HMMA.16816": 32}."""
        found = (item for item in self.instructions if item.base in MATRIX)
        return dict(Counter(_shape(item) for item in found))

    def main_loop(self) -> tuple[Instruction, ...]:
        """The loop that a long input spends its time in, as far as code without counts can tell.

        It is the innermost loop with most matrix instructions, then most loads. Where a kernel peels its edge, two
        loops have as many of both: one for whole tiles, one that masks what lies behind the diagonal, the window or
        the end of a sequence. Of those it is the shorter one, for the kernels are written so that masked tiles are
        few: a split of decode is 8 whole tiles of 64 positions, and one masked tile in the last split of a sequence
        (paged_attention/triton_tile.py, `attend`; 249 instructions a whole tile and 326 a masked one on sm_90). A
        kernel that masked every tile has one loop only, and is judged by it. Without matrix instructions: the loop
        with most loads, then the longest.
        """
        innermost = [
            loop
            for loop in self.loops
            if not any(other != loop and loop.first <= other.first and other.last <= loop.last for other in self.loops)
        ]
        bodies = [self.instructions[loop.first : loop.last] for loop in innermost]
        return max(bodies, key=_weight, default=())


def widths(body: Sequence[Instruction], names: Sequence[str]) -> dict[int, int]:
    """How many of the named instructions move how many bytes per thread."""
    return dict(Counter(item.width for item in body if item.base in names))


def _weight(body: tuple[Instruction, ...]) -> tuple[int, int, int]:
    bases = [item.base for item in body]
    matrix = sum(base in MATRIX for base in bases)
    return matrix, sum(base in (*LOADS, *BULK) for base in bases), -len(body) if matrix else len(body)


def _shape(item: Instruction) -> str:
    shape = next((part for part in item.name.split(".") if re.fullmatch(r"\d+|\d+x\d+x\d+", part)), "")
    return f"{item.base}.{shape}" if shape else item.base


def disassemble(cubin: bytes) -> Sass:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code = _tool("nvdisasm", "-c", file.name)
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
    instructions, loops = _parse(code)
    return Sass(instructions, loops, _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage))


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BIN / name), *arguments], capture_output=True, text=True, check=True).stdout


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump printed no {pattern}")
    return int(match.group(1))


def _parse(code: str) -> tuple[tuple[Instruction, ...], tuple[Loop, ...]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if match := _LABEL.match(line.strip()):
            labels[match.group(1)] = len(instructions)
        elif match := _INSTRUCTION.search(line):
            instructions.append(Instruction(match.group(1), match.group(2)))
    loops = []
    for position, item in enumerate(instructions):
        if item.base == "BRA":
            starts = [labels[name] for name in _TARGET.findall(item.operands) if labels.get(name, position) < position]
            loops += [Loop(start, position + 1) for start in starts]
    return tuple(instructions), tuple(loops)
