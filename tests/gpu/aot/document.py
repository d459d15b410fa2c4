"""`make gpu-report`: prints the machine code of every case, and writes docs/KERNELS.md from it and from the audit.

The full table goes to build/gpu-gates/report.txt; the document holds what decides speed: one line per case and GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import triton

from tests.gpu.aot import audit, gate, report
from tests.gpu.aot.cases import all_cases
from tests.gpu.aot.gate import CaseRow
from tests.gpu.aot.targets import TARGETS
from tests.gpu.environments import CACHE

DOCUMENT = Path("docs/KERNELS.md")
_KERNELS = ("split_kernel", "prefill_kernel", "packed_kernel", "direct_kernel")

_HEAD = """\
# The GPU kernels

<!-- Written by `make gpu-report`: change tests/gpu/aot/document.py, not this file. -->

**No GPU has run these kernels yet.** They were written on machines without one. What is known of them was found on a
CPU: what they compute (Triton's interpreter, corrected, and ttsem, which executes Triton's own IR), what they touch
(every access inside its argument, no races between program instances, no byte of a weight or of the KV cache asked for
twice) and what they compile to. The times below are floors, from bytes and operations and data sheets: no
implementation can be faster, and how close these kernels come is unknown until `bench/gpu.py` has run on a GPU.

`make gpu-gates` checks all of it and ends with `N passed, N failed`; `make gpu-gates ARGS=--quick` is the form for CI,
at most 8 minutes on two cores. CONTRIBUTING.md, "Without a GPU", says how to work with them.

## What is checked, and by what

| question | checked by |
|---|---|
| Are the numbers right? | `tests/gpu/numerics` against float64, in the interpreter and under ttsem |
| Does the interpreter compute what a GPU does? | every cast of bf16 and fp8 is torch's, bit for bit; TF32 is rounded |
| Does a kernel touch what is not its own? | our sanitizer, every access against its own argument; ttsem |
| Do program instances race? | both; ours knows release, acquire, and where a barrier must be |
| Does the order of programs matter? | the interpreter runs them forward, in reverse and shuffled |
| Is a row the same whoever is beside it? | bit-equal alone and among 1, 7 and 64 neighbours |
| Is anything loaded twice? | bytes requested over bytes unique, at most 1.05 for weights and KV |
| Does it compile well for GPUs that are not here? | no spills, matrix instructions, 16-byte loads, a baseline |
| Does it compile to anything at all? | a kernel that stores nothing is a trap of ptxas's (tensor memory of sm_100) |
| How many launches and bytes has a step? | the executor that serves, on tensors without storage |
| Is every kind, size and edge among the tests? | `tests/gpu/test_checklist.py` |
| Does the one script for a GPU reach its end? | `bench/gpu.py --rehearse`, every phase in the interpreter |
| Are the checks awake? | faults planted in correct kernels |

Machine code is made for {targets}.
What none of this sees: caches, bank conflicts, the memory controller, clocks, stalls.
"""


def main() -> int:
    is_quick = "--quick" in sys.argv[1:]
    names = [name for name, case in all_cases().items() if case.is_quick or not is_quick]
    rows = gate.compile_cases(names, list(TARGETS))
    text = report.table(rows)
    (CACHE / "report.txt").write_text(text + "\n")
    print(text)
    found = gate.problems(rows)
    print("\n".join(found))
    DOCUMENT.write_text(document(rows))
    print(f"{len(rows)} kernels compiled, {len(found)} problems; {DOCUMENT} written")
    return 0


def document(rows: Sequence[CaseRow]) -> str:
    """The whole of docs/KERNELS.md."""
    head = _HEAD.format(targets=", ".join(f"{target.name} ({target.gpu})" for target in TARGETS.values()))
    return "\n".join([head, *_floors(), *_goals(rows), *_machine_code(rows), *_waivers(rows)])


def _floors() -> list[str]:
    """One decode step: what it moves, and no faster than."""
    gpus = [target for target in TARGETS.values() if target.is_cuda]
    lines = [
        "## One decode step: launches, bytes, floors",
        "",
        "Launches of a whole step, sampling among them, and of one layer (at most 6). Weights (norms among them), KV",
        "and activations in GB. The floor is the longer of bytes over the data sheet's bandwidth and operations over",
        "its dense 16-bit rate, in milliseconds a step of all sequences.",
        "",
        "| model and weights | sequences x context | launches | a layer | weights | KV | activations |"
        + "".join(f" {target.gpu} |" for target in gpus),
        "|---|---|---|---|---|---|---|" + "---|" * len(gpus),
    ]
    for load in audit.LOADS:
        result = audit.audit(load)
        sizes = [f"{size / 1e9:.2f}" for size in (result.weights, result.kv)] + [f"{result.activations / 1e9:.3f}"]
        cells = [f"{load.model.name}, {load.kind}", f"{load.num_seqs} x {load.context}"]
        cells += [str(len(result.launches)), str(len(result.layer)), *sizes]
        cells += [f"{1e3 * result.floor(target):.2f}" for target in gpus]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _goals(rows: Sequence[CaseRow]) -> list[str]:
    """The loops that decide decoding, beside what we want of them."""
    lines = [
        "## Two loops with a goal",
        "",
        "Instructions of the main loop on sm_90.",
        "",
        "| loop | case | instructions | goal |",
        "|---|---|---|---|",
    ]
    for goal in gate.GOALS:
        meant = [item for item in rows if goal.is_for(item)]
        lines += [f"| {goal.what} | {item.case} | {item.row.loop} | {goal.instructions} |" for item in meant]
    return [*lines, ""]


def _machine_code(rows: Sequence[CaseRow]) -> list[str]:
    """The kernels that multiply, one line per case, one column per target."""
    targets = list(TARGETS)
    lines = [
        "## Machine code",
        "",
        f"Triton {triton.__version__}. Of each case the kernel that multiplies: registers / CTAs per SM / length",
        "of its main loop (instructions), its matrix instruction, and spills. `make gpu-report` prints all kernels.",
        "",
        f"| case | {' | '.join(targets)} |",
        "|---|" + "---|" * len(targets),
    ]
    cases: dict[str, dict[str, str]] = {}
    for item in rows:
        if item.row.kernel in _KERNELS and item.row.target not in cases.setdefault(item.case, {}):
            cases[item.case][item.row.target] = _cell(item)
    for name, cells in cases.items():
        lines.append(f"| {name} | {' | '.join(cells.get(target, '') for target in targets)} |")
    return [*lines, ""]


def _cell(item: CaseRow) -> str:
    row = item.row
    if row.error:
        return "does not compile"
    kinds = "+".join(kind.removeprefix("v_") for kind in row.matrix_kinds) or "-"
    spills = f", spills {row.spills}" if row.spills else ""
    return f"{row.registers} / {row.ctas} / {row.loop} {kinds}{spills}"


def _waivers(rows: Sequence[CaseRow]) -> list[str]:
    """What is not reached: the reason, and how many kernels it is about."""
    if not gate.WAIVERS:
        return []
    lines = [
        "## Not reached",
        "",
        "Checks that the gate does not make of some kernels, and why. The baseline names each of them and how bad it",
        "is; another one that fails, a worse figure and a waiver that nothing needs any more fail the gate.",
        "",
        "| cases | kernel | targets | check | kernels | worst | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for waiver in gate.WAIVERS:
        meant = [(item, fault) for item in rows if waiver.matches(item) for fault in gate.faults(item)]
        needing = [(item, fault) for item, fault in meant if fault.check == waiver.check]
        worst = max(needing, key=lambda pair: pair[1].number, default=None)
        shown = "" if worst is None else worst[1].text.split(" (")[0]
        cells = ("<br>".join(waiver.case.split()), waiver.kernel, waiver.target.replace(" ", "<br>"), waiver.check)
        lines.append(f"| {' | '.join((*cells, str(len(needing)), shown, waiver.reason))} |")
    return [*lines, ""]


if __name__ == "__main__":
    sys.exit(main())
