"""The machine's own limits: read bandwidth and the peak of 8-bit multiply-adds (probe.c). Called by `offline.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from bench.peers.install import AbsentError, cache_root

_SOURCE = Path(__file__).with_name("probe.c")
_SECONDS = 0.4


def read_bandwidth(cpus: Sequence[int]) -> float:
    """Bytes per second that these cores read from memory together, now. Raises AbsentError."""
    return _run("read", cpus)["read"]


def multiply_add_peaks(cpus: Sequence[int]) -> dict[str, float]:
    """8-bit multiply-adds per second: "int16" (256-bit, int16 sums) and, where present, "vnni". Raises AbsentError."""
    return _run("peak", cpus)


def _run(what: str, cpus: Sequence[int]) -> dict[str, float]:
    command = [str(_program()), what, ",".join(map(str, cpus)), str(_SECONDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AbsentError("the probe needs an x86-64 core with AVX2" if done.returncode == 3 else "the probe failed")
    result: dict[str, float] = json.loads(done.stdout)
    return result


@cache
def _program() -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise AbsentError("no C compiler for the probe of the machine's limits: apt install gcc")
    program = cache_root() / "probe"
    program.parent.mkdir(parents=True, exist_ok=True)
    options = ["-O3", "-march=native", "-pthread", "-Wall", "-Wextra", "-Werror"]
    done = subprocess.run([compiler, *options, str(_SOURCE), "-o", str(program)], capture_output=True, check=False)
    if done.returncode:
        raise AbsentError("the probe of the machine's limits does not compile")
    return program
