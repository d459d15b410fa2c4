"""`make gpu-gates`: everything that can be known about the GPU kernels without a GPU. Ends with `N passed, N failed`.

    make gpu-gates                     all of it: 22 minutes on two cores, and half an hour more for kernels that are
                                       not compiled yet; what has not changed since it last passed is not run again
    make gpu-gates ARGS=--quick        at most 8 minutes on two cores, for CI
    make gpu-gates ARGS="linear"       only steps whose name contains this
    make gpu-gates ARGS=--fresh        forget what passed before
    make gpu-gates ARGS=--update       make today's machine code the baseline
    make gpu-report                    the table of the machine code, and docs/KERNELS.md

Interpreter, ttsem and compiler are different processes: what `@triton.jit` means is decided when it is imported. Two
steps run at a time.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.environments import CACHE, TRITON, TTSEM, Environment

_PASSED = CACHE / "passed"
_TIMEOUT = 3600  # seconds; a kernel that hangs the interpreter must not hang CI
TARGETS = ("cuda:90", "cuda:80", "cuda:89", "cuda:100", "hip:gfx942")
_QUICK_TARGETS = ("cuda:90", "cuda:80")
_QUICK_TTSEM = 2
_PYTEST = ("-o", "timeout=900", "-p", "no:cacheprovider")  # a machine that does other things takes its time


@dataclass(frozen=True)
class Step:
    """One process. command: without the interpreter. weight: about how long, the longest start first. most:
    parametrisations of a test, 0: all."""

    name: str
    command: tuple[str, ...]
    environment: Environment
    interprets: bool = False
    weight: int = 1
    most: int = 0


@dataclass(frozen=True)
class Outcome:
    """passed, failed: checks of one step. text: what it printed."""

    step: Step
    passed: int
    failed: int
    seconds: float
    text: str
    is_cached: bool = False


def steps(*, quick: bool) -> Iterator[Step]:
    """Every process of the gates."""
    targets = _QUICK_TARGETS if quick else TARGETS
    for target in targets:
        command = ("-m", "tests.gpu.aot", "--check", "--processes", "1", "--targets", target)
        yield Step(f"machine code {target}", (*command, "--quick") if quick else command, TRITON, weight=900)
    yield Step("launch audit", ("-m", "tests.gpu.aot.audit"), TRITON, weight=5)
    for path in _test_files():
        name = path.relative_to("tests/gpu").with_suffix("")
        size = path.stat().st_size
        yield Step(
            f"interpreter {name}",
            ("-m", "pytest", "-q", *_PYTEST, str(path)),
            TRITON,
            interprets=True,
            weight=size // 100,
        )
        if path.parent.name not in ("interpreter", "e2e") and "(interpreter only)" not in path.read_text():
            command = ("-m", "ttsem.sanitize", "pytest", "-q", "-rs", *_PYTEST, str(path))
            most = _QUICK_TTSEM if quick else 0
            yield Step(f"ttsem {name}", command, TTSEM, weight=size // 25, most=most)


def _test_files() -> list[Path]:
    return sorted(Path("tests/gpu").rglob("test_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="make gpu-gates", description=__doc__)
    parser.add_argument("only", nargs="*", help="steps whose name contains one of these")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="run what passed before, too")
    parser.add_argument("--update", action="store_true", help="make the machine code the baseline")
    parser.add_argument("--report", action="store_true", help="print the machine code, write docs/KERNELS.md")
    args = parser.parse_args()
    TRITON.set_up()
    if args.update or args.report:
        module = ["tests.gpu.aot.document"] if args.report else ["tests.gpu.aot", "--update"]
        module += ["--quick"] if args.quick else []
        return subprocess.run([sys.executable, "-m", *module], env=TRITON.variables()).returncode
    wanted = [step for step in steps(quick=args.quick) if not args.only or any(part in step.name for part in args.only)]
    failed = 0
    if TTSEM.why_not:
        skipped = [step for step in wanted if step.environment is TTSEM]
        wanted = [step for step in wanted if step.environment is not TTSEM]
        print(f"SKIPPED: {len(skipped)} steps under ttsem: {TTSEM.why_not}", file=sys.stderr)
    elif any(step.environment is TTSEM for step in wanted):
        TTSEM.set_up()
    passed = 0
    start = time.monotonic()
    for outcome in _run_all(wanted, fresh=args.fresh):
        passed, failed = passed + outcome.passed, failed + outcome.failed
        _print(outcome)
    print(f"gpu-gates: {time.monotonic() - start:.0f} s")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _run_all(wanted: Sequence[Step], *, fresh: bool) -> Iterator[Outcome]:
    key = _fingerprint()
    with ThreadPoolExecutor(2) as pool:
        queue = sorted(wanted, key=lambda step: -step.weight)
        futures = [pool.submit(_run, step, key, fresh=fresh) for step in queue]
        yield from (future.result() for future in as_completed(futures))


def _run(step: Step, key: str, *, fresh: bool) -> Outcome:
    name = hashlib.sha256(f"{key} {step}".encode()).hexdigest()
    stamp = _PASSED / name
    if stamp.is_file() and not fresh:
        return Outcome(step, int(stamp.read_text()), 0, 0.0, "", is_cached=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *step.command],
            env={**step.environment.variables(interprets=step.interprets), "HEADRACE_GPU_QUICK": str(step.most)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT,
        )
        code, text = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, text = 1, f"{error.stdout!r}\nstopped after {_TIMEOUT} s"
    passed, failed = _counts(text)
    if code and not failed:
        failed = 1  # it ended before it could count
    if not failed:
        _PASSED.mkdir(parents=True, exist_ok=True)
        stamp.write_text(str(passed))
    return Outcome(step, passed, failed, time.monotonic() - begin, text)


def _counts(text: str) -> tuple[int, int]:
    """Of the last line that counts: pytest's summary, or "12 kernels compiled, 0 problems"."""
    for line in reversed(text.splitlines()):
        if match := re.search(r"(\d+) kernels compiled, (\d+) problems", line):
            failed = int(match.group(2))
            return max(0, int(match.group(1)) - failed), failed
        numbers = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?)", line)}
        if numbers:
            return numbers.get("passed", 0), sum(count for word, count in numbers.items() if word != "passed")
    return 0, 0


def _print(outcome: Outcome) -> None:
    when = "as before" if outcome.is_cached else f"{outcome.seconds:.0f} s"
    print(f"{outcome.step.name}: {outcome.passed} passed, {outcome.failed} failed ({when})", flush=True)
    if outcome.failed:
        lines = outcome.text.splitlines()
        is_code = outcome.step.name.startswith("machine code")
        kept = [line for line in lines if ": " in line and " on " in line] if is_code else lines[-200:]
        print("\n".join(f"    {line}" for line in kept), flush=True)
    for line in outcome.text.splitlines():
        if "too large to be checked" in line or line.startswith("SKIPPED"):
            print(f"    {line}", flush=True)


def _fingerprint() -> str:
    """Of everything that a gate's result follows from: kernels, their tests, the models that they are made for."""
    folders = ("kernels/headrace/kernels", "server/headrace/models", "tests/gpu")
    files = sorted(path for folder in folders for path in Path(folder).rglob("*") if path.suffix in (".py", ".json"))
    digest = hashlib.sha256(repr((TRITON.requirements, TTSEM.requirements, sys.version)).encode())
    for path in files:
        digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
