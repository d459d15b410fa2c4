"""Everything that only a GPU can tell, in one run of under 9 minutes on one GPU. JSON lines, each naming the GPU.

    python bench/gpu.py --save        append to bench/results/gpu.jsonl, write the tuning table of this GPU
    python bench/gpu.py --only times  one phase: numerics, tune, times, steps, server
    python bench/gpu.py --dry-run     what would run, and which peers are here; needs no GPU
    python bench/gpu.py --rehearse    every phase at tiny sizes in Triton's interpreter: does the script reach its end?

Phases (_gpu_phases.py): the kernels' tests on the device; tuning to JSON; times against the floor and against peers;
decode steps, and how much of them lies between launches; the server under load. Each is a process of its own: what it
printed counts and is saved at once, whatever it then does, and it is stopped when its time is over. At the end the
targets of the project stand beside what was reached. Has not run on a GPU yet: no machine of this project had one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import RESULTS, ROOT

SECONDS = 535.0  # of a whole run
GRACE = 10.0  # seconds beyond its own for a phase to end by itself


@dataclass(frozen=True)
class Phase:
    """A part of the run and the most seconds that it may take."""

    name: str
    seconds: float
    what: str


PHASES = (
    Phase("numerics", 140.0, "the kernels' tests and the executor's, file by file"),
    Phase("tune", 95.0, "block sizes of Llama-3-8B's shapes, then of the default model's, as far as time allows"),
    Phase(
        "times", 105.0, "kernels beside their floors (bytes over measured copy bandwidth) and the peers that are here"
    ),
    Phase("steps", 50.0, "decode steps of the default model: what lies between the graphs is neither kernel nor need"),
    Phase("server", 100.0, "headrace bench against a server of its own on the triton back end, few streams and many"),
)


@dataclass(frozen=True)
class Target:
    """What the project wants. name: a line's `goals` says which it speaks to. is_least: at least `goal`, or at most."""

    name: str
    goal: float
    what: str
    is_least: bool = True

    def is_reached(self, value: float) -> bool:
        return value >= self.goal if self.is_least else value <= self.goal


TARGETS = (
    Target("decode_attention", 0.85, "decode attention, share of the measured copy bandwidth"),
    Target("w4a16", 3.2, "W4A16 at 1 to 16 rows, times faster than cuBLAS in bf16"),
    Target("prefill_attention", 0.70, "prefill attention, share of the speed of FlashAttention's best that is here"),
    Target("launch_gap", 0.03, "decode steps with graphs, share of the time between launches", is_least=False),
)


class Results:
    """The lines of a run: printed and, with `save`, appended to bench/results/gpu.jsonl one by one."""

    def __init__(self, gpu: dict[str, Any], *, save: bool) -> None:
        self._gpu = gpu
        self._path = Path(RESULTS) / "gpu.jsonl" if save else None
        self.errors = 0
        self.values: dict[str, list[float]] = {target.name: [] for target in TARGETS}

    def __call__(self, phase: str, **values: Any) -> None:
        self.errors += "error" in values
        reached = values.get("goals", {})
        for target in TARGETS:
            if target.name in reached:
                value = reached[target.name]
                self.values[target.name].append(value)
                values["goals"] = reached = {
                    **reached,
                    target.name: {"reached": value, "goal": target.goal, "passed": target.is_reached(value)},
                }
        line = json.dumps({"bench": "gpu", "phase": phase, **values, **self._gpu})
        print(line, flush=True)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(line + "\n")

    def targets(self) -> None:
        """One line per target: the worst and the best of what speaks to it. passed: null where nothing does."""
        for target in TARGETS:
            values = sorted(self.values[target.name], reverse=not target.is_least)
            self(
                "targets",
                target=target.what,
                goal=target.goal,
                measured=len(values),
                worst=values[0] if values else None,
                best=values[-1] if values else None,
                passed=target.is_reached(values[0]) if values else None,
            )


def run_phase(phase: Phase, seconds: float, results: Results, *, rehearse: bool) -> bool:
    """Run a phase in a process group of its own, at most `seconds`; whether it came to its end."""
    command = [sys.executable, str(Path(__file__).with_name("_gpu_phases.py")), phase.name, str(seconds)]
    command += ["--rehearse"] if rehearse else []
    begin, is_late, last = time.monotonic(), threading.Event(), ""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)

    def stop() -> None:
        is_late.set()
        _kill_group(process.pid)

    timer = threading.Timer(seconds + GRACE, stop)
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            values = _values(line)
            if values is None:
                last = line.strip()[-300:]
                print(last, file=sys.stderr, flush=True)
            else:
                results(phase.name, **values)
        status = process.wait()
        process.stdout.close()
    finally:
        timer.cancel()
        _kill_group(process.pid)  # what it may have left behind
    outcome = "stopped: out of time" if is_late.is_set() else "done" if status == 0 else f"failed with status {status}"
    results("phase", name=phase.name, outcome=outcome, seconds=round(time.monotonic() - begin, 1), last=last)
    return outcome == "done"


def _values(line: str) -> dict[str, Any] | None:
    """A result; None for what a library printed."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in PHASES], help="default: all, in order")
    parser.add_argument("--save", action="store_true", help="append the lines to bench/results/gpu.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    parser.add_argument("--rehearse", action="store_true", help="all phases, tiny, in Triton's interpreter")
    options = parser.parse_args()
    phases = [phase for phase in PHASES if options.only is None or phase.name in options.only]
    if options.dry_run:
        _print_plan(phases)
        return 0
    if options.rehearse and options.save:
        parser.error("times of a rehearsal mean nothing and are not saved")
    if options.rehearse and os.environ.get("TRITON_INTERPRET") != "1":
        return _in_interpreter()
    return run(phases, save=options.save, rehearse=options.rehearse)


def run(phases: Sequence[Phase], *, save: bool, rehearse: bool) -> int:
    """All phases; 1 where one did not come to its end."""
    import _gpu
    import _gpu_peers

    if not rehearse:
        os.environ.pop("TRITON_INTERPRET", None)
    gpu = {"gpu": "none: a rehearsal in Triton's interpreter"} if rehearse else _gpu.gpu_line()
    if not gpu:
        print("no GPU: nothing here can be measured (--dry-run and --rehearse need none)", file=sys.stderr)
        return 1
    results = Results(gpu, save=save)
    results("start", phases=[phase.name for phase in phases], peers=_gpu_peers.reasons())
    for name, why in _gpu_peers.reasons().items():
        if why:
            print(f"SKIPPED PEER {name}: {why}", file=sys.stderr, flush=True)
    begin = time.monotonic()
    ends = [_run_in_time(phase, begin, results, rehearse=rehearse) for phase in phases]
    results.targets()
    counts = {"passed": sum(ends), "failed": len(ends) - sum(ends), "lines_with_errors": results.errors}
    results("end", seconds=round(time.monotonic() - begin, 1), **counts)
    return 0 if all(ends) else 1


def _run_in_time(phase: Phase, begin: float, results: Results, *, rehearse: bool) -> bool:
    left = SECONDS - (time.monotonic() - begin)
    if left < 2 * GRACE:
        results("phase", name=phase.name, outcome="not begun: out of time", seconds=0.0)
        return False
    return run_phase(phase, min(phase.seconds, left - GRACE), results, rehearse=rehearse)


def _in_interpreter() -> int:
    """This command again, with the Triton whose interpreter works (tests/gpu/environments.py fetches it once)."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from tests.gpu.environments import TRITON

    TRITON.set_up()
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
    return subprocess.run(command, env=TRITON.variables(interprets=True), check=False).returncode


def _print_plan(phases: Sequence[Phase]) -> None:
    import _gpu
    import _gpu_peers

    for phase in phases:
        print(json.dumps({"phase": phase.name, "seconds": phase.seconds, "what": phase.what}))
    plan = {
        "attention": [str(case) for case in _gpu.attention_cases()],
        "products": [f"{m} x {n} x {k} ({name})" for m, (name, n, k, _) in _gpu.timed_products()],
        "peers": _gpu_peers.reasons(),
        "targets": {target.what: target.goal for target in TARGETS},
    }
    print(json.dumps({"bench": "gpu", "dry_run": True, "seconds": sum(phase.seconds for phase in phases), **plan}))


if __name__ == "__main__":
    sys.exit(main())
