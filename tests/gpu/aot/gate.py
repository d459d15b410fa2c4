"""Compiles cases and holds their machine code against the committed baseline. Called by gates.py and report.py.

What must hold, for every kernel of every case on every target that it is meant for:
- it compiles, to code that stores something, and nothing is spilled;
- where its case multiplies, the matrix instruction of that target and type is there, and 7 of 10 bytes that the main
  loop loads come 16 at a time;
- shared memory is not above, and CTAs per SM are not below, the baseline;
- the main loop has at most 3 % more instructions than the baseline.
GOALS are what the project wants of two loops that decide decoding; WAIVERS are what is not reached yet, with reasons.
Which rows use a waiver, and how bad they are, is in the baseline, row by row: another row that needs it, a worse figure
and a row or a pattern that no longer needs it ("stale waiver") are problems.

The baseline belongs to one version of Triton: another one's machine code differs (by up to 20 % in these loops).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from tests.gpu.aot.capture import capture
from tests.gpu.aot.cases import all_cases
from tests.gpu.aot.row import Row, analyse
from tests.gpu.aot.targets import TARGETS, Target

BASELINE = Path(__file__).with_name(f"baseline-{triton.__version__}.json")
LOOP_GROWTH = 1.03
WIDE_LOSS = 0.03  # of a share that is waived
WIDE_SHARE = 0.7  # the rest are scales and zeros, 2 to 8 bytes of each group
_MATRIX = {
    ("cuda", "float"): ("HMMA", "HGMMA", "UTCHMMA", "QMMA", "QGMMA", "UTCQMMA"),
    ("cuda", "int8"): ("IMMA", "IGMMA", "UTCIMMA", "IDP"),
    ("hip", "float"): ("v_mfma_f32",),
    ("hip", "int8"): ("v_mfma_i32",),
}
# What many rows must be multiplied with where there is more than a warp's instruction.
_MANY = {"cuda:90": ("HGMMA", "QGMMA"), "cuda:100": ("UTCHMMA", "UTCQMMA")}
WITHOUT_MATRIX = ("reduce_kernel", "_groups_kernel")  # kernels of cases that multiply which themselves do not


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
    """A check that matching rows need not pass, and why. checks: spill, matrix, wide, goal.

    case, kernel ("split_kernel#2": the second of its name in a case) and target: shell patterns, any of those that
    spaces part. For every pattern of `case` on every one of `target` there must be a row that needs the waiver.
    """

    case: str
    kernel: str
    target: str
    check: str
    reason: str

    def matches(self, item: CaseRow) -> bool:
        kernel = item.key.removeprefix(item.case).strip()
        names = ((item.case, self.case), (kernel, self.kernel), (item.row.target, self.target))
        return all(_fits(name, patterns) for name, patterns in names)


def _fits(name: str, patterns: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns.split())


WAIVERS = (
    Waiver(
        "linear/int4-g32z/*/qkv/16 linear/int4-g32z/llama-3-8b/qkv/* linear/int4-g128*/qkv/*"
        " linear/int8-g32/*/qkv/16",
        "packed_kernel persistent_packed_kernel",
        "cuda:80 cuda:89 cuda:90 cuda:100",
        "wide",
        "a tile is a head of 128 rows that 8 warps share: 8 bytes of packed weights a thread, sectors used whole",
    ),
    Waiver(
        "linear/int4-g32z/* linear/int4-g128*/* linear/int8-g32/*",
        "packed_kernel",
        "hip:gfx942",
        "wide",
        "tiles are laid out for warps of 32 lanes; 8 bytes a lane are 512 a wave, in one piece",
    ),
    Waiver(
        "linear/fp8_block/*/qkv/16",
        "direct_kernel",
        "cuda:89 cuda:90 cuda:100",
        "wide",
        "the rest are x's scales of a block, 4 bytes a row; weights and activations come 16 at a time",
    ),
    Waiver(
        "linear/fp8_block/*/64", "direct_kernel", "cuda:90 cuda:100", "wide",
        "as above: every thread of a warp group needs the scales of 64 rows",
    ),
    Waiver(
        "linear/fp8_block/*/16",
        "direct_kernel",
        "cuda:100",
        "wide",
        "as above: 32 rows of a tile of 128 lie in every thread as tensor memory is read",
    ),
    Waiver(
        "linear/fp8_block/*/512 linear/fp8_block/*/2048",
        "persistent_direct_kernel",
        "cuda:90 cuda:100",
        "wide",
        "TMA brings weights and activations; what is counted are x's scales of a block, 4 bytes a row",
    ),
    Waiver(
        "linear/int4-g32z/*/512 linear/int4-g128z/*/512 linear/int4-g32z/*/2048 linear/int4-g128z/*/2048",
        "persistent_packed_kernel",
        "cuda:80 cuda:89 cuda:90",
        "wide",
        "the rest are sums of groups, 8 bytes as the accumulators lie, the same for all warps: from the first cache",
    ),
    Waiver(
        "attention/*/head-dim-16", "split_kernel split_kernel#2 prefill_kernel", "hip:gfx942", "wide",
        "a tile is 2 KiB, 8 bytes for each of 256 lanes",
    ),
)  # fmt: skip


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
    rows = list(rows)
    baseline = read_baseline()
    found: list[str] = []
    for item in rows:
        before = baseline.get(item.key, {}).get(item.row.target)
        texts = [*_unwaived(item, before), *([] if item.row.error else _worse(item, before))]
        found += [f"{item.key} on {item.row.target}: {text}" for text in texts]
    return [*found, *_stale(rows)]


@dataclass(frozen=True)
class Fault:
    """What is wrong with a row by itself. check: of those that a waiver names, or "". number: how bad, for a ratchet:
    spills, the share of wide loads below WIDE_SHARE, instructions."""

    check: str
    text: str
    number: float = 0.0


def faults(item: CaseRow) -> list[Fault]:
    """By no other measure than the rules."""
    row = item.row
    if row.error:
        return [Fault("", f"does not compile: {row.error}")]
    found: list[Fault] = []
    if not row.stores:
        # ptxas gives up silently: a kernel that wants more tensor memory than there is becomes a trap.
        memory = f", {row.tensor_memory} columns of tensor memory" if row.tensor_memory else ""
        found.append(Fault("", f"stores nothing: {row.size} instructions, {row.registers} registers{memory}"))
    if row.spills:
        found.append(Fault("spill", f"spills {row.spills}", row.spills))
    wanted = all_cases()[item.case].matrix
    if wanted == "many" and not row.kernel.startswith("persistent"):
        wanted = "float"  # sums of x over rows and groups, before the product
    if wanted and row.kernel not in WITHOUT_MATRIX and not _has_matrix(row, wanted):
        found.append(Fault("matrix", f"no matrix instruction for {wanted} (has {row.matrix_kinds or 'none'})"))
    if row.matrix and row.wide_share < WIDE_SHARE:
        text = f"{row.wide_share:.0%} of the bytes loaded come 16 at a time ({row.loop_loads or row.loads})"
        found.append(Fault("wide", text, round(WIDE_SHARE - row.wide_share, 2)))
    missed = (goal for goal in GOALS if goal.is_for(item) and row.loop > goal.instructions)
    found += [
        Fault("goal", f"{goal.what}: {row.loop} instructions, the goal is {goal.instructions}", row.loop)
        for goal in missed
    ]
    return found


def _unwaived(item: CaseRow, before: Mapping[str, Any] | None) -> Iterator[str]:
    """Faults that no waiver excuses, faults that became worse, and waivers that the row no longer needs."""
    waived = {} if before is None else before.get("waived", {})
    found = faults(item)
    for fault in found:
        if waiver_of(item, fault.check) is None:
            yield fault.text
        elif before is not None and fault.check not in waived:
            yield f"{fault.text}; it did not when the baseline was made"
        elif before is not None and fault.number > waived[fault.check] + (WIDE_LOSS if fault.check == "wide" else 0):
            yield f"{fault.text}, which is worse than what is waived"
    if not item.row.error:
        for check in sorted(waived.keys() - {fault.check for fault in found}):
            yield f"stale waiver: it passes {check!r} now; run make gpu-gates ARGS=--update"


def _worse(item: CaseRow, before: Mapping[str, Any] | None) -> Iterator[str]:
    """Than the baseline."""
    row = item.row
    if before is None:
        yield f"not in {BASELINE.name}; run make gpu-gates ARGS=--update"
        return
    if row.loop > before["loop"] * LOOP_GROWTH:
        yield f"main loop {row.loop} instructions, baseline {before['loop']}"
    if row.ctas < before["ctas"]:
        yield f"{row.ctas} CTAs per SM (by {row.limit}), baseline {before['ctas']}"
    if row.shared > before["shared"]:
        yield f"{row.shared} bytes of shared memory, baseline {before['shared']}"


def _stale(rows: Sequence[CaseRow]) -> Iterator[str]:
    """Patterns of waivers that no row needs, as far as all of their cases were compiled."""
    compiled = {(item.case, item.row.target) for item in rows}
    for waiver in WAIVERS:
        for pattern in waiver.case.split():
            meant = [case for name, case in all_cases().items() if fnmatch(name, pattern)]
            for target in waiver.target.split():
                named = [found for name, found in TARGETS.items() if fnmatch(name, target)]
                units = {(case.name, found.name) for case in meant for found in named if case.runs_on(found)}
                needing = (
                    item
                    for item in rows
                    if (item.case, item.row.target) in units and waiver.matches(item)
                    if item.row.error or waiver.check in {fault.check for fault in faults(item)}
                )
                if units <= compiled and next(needing, None) is None:
                    where = f"{pattern!r} ({waiver.kernel}) on {target!r}"
                    yield f"stale waiver: {where}: no row needs it for {waiver.check!r}"


def _has_matrix(row: Row, wanted: str) -> bool:
    kinds = _MATRIX[row.target.split(":")[0], "float" if wanted == "many" else wanted]
    if wanted == "many":
        kinds = _MANY.get(row.target, kinds)
    return any(name.startswith(kinds) for name in row.matrix)


def waiver_of(item: CaseRow, check: str) -> Waiver | None:
    """The waiver of a check for a row, if there is one."""
    return next((waiver for waiver in WAIVERS if waiver.check == check and waiver.matches(item)), None)


def read_baseline() -> dict[str, dict[str, dict[str, Any]]]:
    """By row key and target: loop, ctas, shared; waived: numbers of faults by check, where there are any."""
    if not BASELINE.is_file():
        return {}
    data: dict[str, dict[str, dict[str, Any]]] = json.loads(BASELINE.read_text())
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
            numbers: dict[str, Any] = {"loop": item.row.loop, "ctas": item.row.ctas, "shared": item.row.shared}
            waived = {fault.check: fault.number for fault in faults(item) if waiver_of(item, fault.check)}
            if waived:
                numbers["waived"] = waived
            data.setdefault(item.key, {})[item.row.target] = numbers
    data = {key: row for key, row in data.items() if row}
    lines = [f"{json.dumps(key)}: {json.dumps(dict(sorted(data[key].items())))}" for key in sorted(data)]
    temporary = BASELINE.with_suffix(f".{os.getpid()}")
    temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    temporary.replace(BASELINE)


def targets_of(names: str) -> list[Target]:
    """ "cuda:80,cuda:90" as targets; raises KeyError for an unknown one."""
    return [TARGETS[name] for name in names.split(",")] if names else list(TARGETS.values())
