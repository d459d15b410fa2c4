"""Compiles cases and holds their machine code against the committed baseline. Called by gates.py and report.py.

What must hold, for every kernel of every case on every target that it is meant for:
- it compiles, and nothing is spilled;
- where its case multiplies, the matrix instruction of that target and type is there, and 7 of 10 bytes that the main
  loop loads come 16 at a time;
- shared memory is not above, and CTAs per SM are not below, the baseline;
- the main loop has at most 3 % more instructions than the baseline.
GOALS are what the project wants of two loops that decide decoding; WAIVERS are what is not reached yet, with reasons.

The baseline belongs to one version of Triton: another one's machine code differs (by up to 20 % in these loops).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path

import triton

from tests.gpu.aot.capture import capture
from tests.gpu.aot.cases import all_cases
from tests.gpu.aot.row import Row, analyse
from tests.gpu.aot.targets import TARGETS, Target

BASELINE = Path(__file__).with_name(f"baseline-{triton.__version__}.json")
LOOP_GROWTH = 1.03
WIDE_SHARE = 0.7  # the rest are scales and zeros, 2 to 8 bytes of each group
_MATRIX = {
    ("cuda", "float"): ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA"),
    ("cuda", "int8"): ("IMMA", "IGMMA", "UTCIMMA", "IDP"),
    ("hip", "float"): ("v_mfma_f32",),
    ("hip", "int8"): ("v_mfma_i32",),
}


@dataclass(frozen=True)
class Goal:
    """At most `instructions` in the main loop of kernels of matching cases on `target`."""

    case: str
    kernel: str
    target: str
    instructions: int
    what: str

    def is_for(self, item: CaseRow) -> bool:
        row = item.row
        return fnmatch(item.case, self.case) and (row.kernel, row.target) == (self.kernel, self.target)


GOALS = (
    Goal("attention/decode/llama-3-8b", "split_kernel", "cuda:90", 280, "64 positions of decode, head_dim 128"),
    Goal("linear/int4-g128/llama-3-8b/*/16", "packed_kernel", "cuda:90", 310, "128 columns of W4A16"),
)


@dataclass(frozen=True)
class Waiver:
    """A check that matching rows need not pass, and why. checks: spill, matrix, wide, goal."""

    case: str
    kernel: str
    target: str
    check: str
    reason: str


_OPEN_HEADS = "open: many rows with the heads' epilogue want more registers than there are; a smaller tile would do"
_OPEN_AMD = "open: it compiles; block sizes were chosen for NVIDIA's register files"
WAIVERS = (
    Waiver(
        "linear/int*/qkv/*",
        "packed_kernel",
        "*",
        "wide",
        "a tile is a head of 128 rows that 8 warps share: 8 bytes of packed weights a thread, sectors used whole",
    ),
    Waiver(
        "linear/*",
        "packed_kernel",
        "hip:gfx942",
        "wide",
        "tiles are laid out for warps of 32 lanes; 8 bytes a lane are 512 a wave, in one piece",
    ),
    Waiver(
        "linear/fp8_block/*",
        "direct_kernel",
        "cuda:*",
        "wide",
        "the rest are scales of 4 bytes, one a row and block; weights and activations come 16 at a time",
    ),
    Waiver("linear/fp8_block/qwen3-32b/qkv/2048", "direct_kernel", "cuda:*", "spill", _OPEN_HEADS),
    Waiver("linear/fp8/llama-3-70b-tp4/qkv/2048", "direct_kernel", "cuda:89", "spill", _OPEN_HEADS),
    Waiver("linear/int4*", "packed_kernel", "hip:gfx942", "spill", _OPEN_AMD),
    Waiver("attention/*", "*", "hip:gfx942", "spill", _OPEN_AMD),
    Waiver("attention/prefill/*", "prefill_kernel", "hip:gfx942", "wide", _OPEN_AMD),
    Waiver(
        "rms_norm/plain/*",
        "_rms_norm_kernel",
        "cuda:80",
        "spill",
        "one pair of registers, stored and loaded once a program: ptxas stops at 40 registers for occupancy's sake",
    ),
)


@dataclass(frozen=True)
class CaseRow:
    """A row and where it comes from. key: the case and the kernel, numbered where a case launches it twice."""

    case: str
    key: str
    grid: tuple[int, ...]
    row: Row


def compile_cases(names: Sequence[str], targets: Sequence[str], processes: int = 2) -> list[CaseRow]:
    """Rows of the named cases on the targets that they are meant for, in the order of the names."""
    units = [(name, target) for name in names for target in targets if all_cases()[name].runs_on(TARGETS[target])]
    if processes == 1:
        return [row for unit in units for row in compile_unit(unit)]
    with ProcessPoolExecutor(processes, mp_context=get_context("fork")) as pool:
        return [row for rows in pool.map(compile_unit, units, chunksize=4) for row in rows]


def compile_unit(unit: tuple[str, str]) -> list[CaseRow]:
    """One case on one target."""
    name, target_name = unit
    case, target = all_cases()[name], TARGETS[target_name]
    try:
        with capture(target) as launches:
            case.call(target)
    except Exception as error:
        refused = Row("call", target_name, error=f"{type(error).__name__}: {error}")
        return [CaseRow(name, f"{name} call", (), refused)]
    rows, seen = [], dict[str, int]()
    for launch in launches:
        seen[launch.kernel] = seen.get(launch.kernel, 0) + 1
        number = f"#{seen[launch.kernel]}" if seen[launch.kernel] > 1 else ""
        rows.append(CaseRow(name, f"{name} {launch.kernel}{number}", launch.grid, analyse(launch)))
    return rows


def problems(rows: Iterable[CaseRow]) -> list[str]:
    """What does not hold, one line each."""
    baseline = read_baseline()
    found: list[str] = []
    with_matrix: dict[tuple[str, str], list[CaseRow]] = {}
    for item in rows:
        found += _row_problems(item, baseline.get(item.key, {}).get(item.row.target))
        with_matrix.setdefault((item.case, item.row.target), []).append(item)
    for (name, _), items in with_matrix.items():
        wanted = all_cases()[name].matrix
        if wanted and not any(_has_matrix(item.row, wanted) for item in items) and not any(i.row.error for i in items):
            kinds = sorted({kind for item in items for kind in item.row.matrix_kinds})
            found += _unless_waived(items[0], "matrix", f"no matrix instruction for {wanted} (has {kinds or 'none'})")
    return found


def _row_problems(item: CaseRow, before: dict[str, int] | None) -> list[str]:
    row = item.row
    if row.error:
        return [f"{item.key} on {row.target}: does not compile: {row.error}"]
    found: list[str] = []
    if row.spills:
        found += _unless_waived(item, "spill", f"spills {row.spills}")
    if row.matrix and row.wide_share < WIDE_SHARE:
        loads = row.loop_loads or row.loads
        found += _unless_waived(item, "wide", f"{row.wide_share:.0%} of the bytes loaded come 16 at a time ({loads})")
    for goal in GOALS:
        if goal.is_for(item) and row.loop > goal.instructions:
            text = f"{goal.what}: {row.loop} instructions, the goal is {goal.instructions}"
            found += _unless_waived(item, "goal", text)
    if before is None:
        return [*found, f"{item.key} on {row.target}: not in {BASELINE.name}; run make gpu-gates ARGS=--update"]
    worse = []
    if row.loop > before["loop"] * LOOP_GROWTH:
        worse.append(f"main loop {row.loop} instructions, baseline {before['loop']}")
    if row.ctas < before["ctas"]:
        worse.append(f"{row.ctas} CTAs per SM (by {row.limit}), baseline {before['ctas']}")
    if row.shared > before["shared"]:
        worse.append(f"{row.shared} bytes of shared memory, baseline {before['shared']}")
    return found + [f"{item.key} on {row.target}: {text}" for text in worse]


def _has_matrix(row: Row, wanted: str) -> bool:
    return any(name.startswith(_MATRIX[row.target.split(":")[0], wanted]) for name in row.matrix)


def _unless_waived(item: CaseRow, check: str, text: str) -> list[str]:
    is_waived = waiver_of(item, check) is not None
    return [] if is_waived else [f"{item.key} on {item.row.target}: {text}"]


def waiver_of(item: CaseRow, check: str) -> Waiver | None:
    for waiver in WAIVERS:
        names = ((item.case, waiver.case), (item.row.kernel, waiver.kernel), (item.row.target, waiver.target))
        if waiver.check == check and all(fnmatch(name, pattern) for name, pattern in names):
            return waiver
    return None


def read_baseline() -> dict[str, dict[str, dict[str, int]]]:
    """By row key and target: loop, ctas, shared."""
    if not BASELINE.is_file():
        return {}
    data: dict[str, dict[str, dict[str, int]]] = json.loads(BASELINE.read_text())
    return data


def write_baseline(rows: Iterable[CaseRow], *, targets: Sequence[str], keep_others: bool) -> None:
    """Make these rows the baseline of their targets. keep_others: rows that were not compiled this time stay."""
    before = read_baseline()
    data = {
        key: {name: numbers for name, numbers in row.items() if keep_others or name not in targets}
        for key, row in before.items()
    }
    for item in rows:
        if not item.row.error:
            numbers = {"loop": item.row.loop, "ctas": item.row.ctas, "shared": item.row.shared}
            data.setdefault(item.key, {})[item.row.target] = numbers
    data = {key: row for key, row in data.items() if row}
    lines = [f"{json.dumps(key)}: {json.dumps(dict(sorted(data[key].items())))}" for key in sorted(data)]
    temporary = BASELINE.with_suffix(f".{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(BASELINE)


def targets_of(names: str) -> list[Target]:
    """ "cuda:80,cuda:90" as targets; raises KeyError for an unknown one."""
    return [TARGETS[name] for name in names.split(",")] if names else list(TARGETS.values())
