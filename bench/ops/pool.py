"""How long a step's threads wait for each other, alone and beside other processes: the table of decision 6.

    python bench/ops/pool.py [--rounds 5] [--spin-us 5,50,500] [--beside nothing,hog] [--work arithmetic,memory]

A synthetic step of 250 phases, as many as a decode step of the default model has, whose units are taken as the
executor takes them: in its own way ("units", nobody waits for a thread that holds none) or with a barrier after each
phase ("barrier"). "Beside" are busy loops that this script starts and stops. Prints one JSON object a line, medians
over interleaved rounds: milliseconds per step, nanoseconds per barrier. A round in which other processes took more than
--most-foreign of a core is left out; where none is left, the least disturbed one stands and "rounds" says 0. Called by
hand; tests/kernels/native/test_pool.py uses its prototypes.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from headrace.kernels.native.library import last_error, load

# name -> (busy processes, their niceness)
BESIDE = {"nothing": (0, 0), "hog": (1, 0), "two_hogs": (2, 0), "niced_hog": (1, 19), "two_niced_hogs": (2, 19)}
PHASES, UNITS = 250, 24
MEMORY = 96 << 20  # bytes that a decode step of the default model reads
ARITHMETIC = 3_300  # multiplications of a unit: 20 us a phase on one core of 4 GHz


class Steps(ctypes.Structure):
    """HrPoolSteps of kernels/csrc/headrace_native.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("unit_work", "memory_bytes", "gap_ns", "spin_ns")),
        *((name, ctypes.c_int32) for name in ("steps", "phases", "units", "streams", "meets", "yields")),
    )


@dataclass(frozen=True)
class Policy:
    """How threads wait."""

    form: str  # units or barrier
    spin_us: float
    yields: bool
    is_pinned: bool


class Pool:
    """The native pool of threads. Times in nanoseconds; -1: the default. Raises RuntimeError with the reason."""

    def __init__(
        self,
        num_threads: int,
        *,
        spin_ns: int = -1,
        idle_spin_ns: int = -1,
        is_pinned: bool = False,
        yields: bool = False,
    ) -> None:
        self._library = load()
        self._library.hr_pool_create.restype = ctypes.c_void_p
        self._library.hr_pool_create.argtypes = [ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, *[ctypes.c_int32] * 2]
        for name in ("destroy", "is_pinned"):
            getattr(self._library, f"hr_pool_{name}").argtypes = [ctypes.c_void_p]
        self._library.hr_pool_destroy.restype = None
        self._library.hr_pool_barrier_test.restype = ctypes.c_int64
        self._library.hr_pool_barrier_test.argtypes = [ctypes.c_void_p, *[ctypes.c_int32] * 2, ctypes.c_void_p]
        self._library.hr_pool_steps_test.argtypes = [ctypes.c_void_p] * 3
        self.num_threads = num_threads
        self._pool = self._library.hr_pool_create(num_threads, spin_ns, idle_spin_ns, is_pinned, yields)
        if not self._pool:
            raise RuntimeError(last_error())

    @property
    def is_pinned(self) -> bool:
        return bool(self._library.hr_pool_is_pinned(self._pool))

    def barriers(self, runs: int, barriers: int) -> tuple[int, list[int]]:
        """hr_pool_barrier_test: what threads saw too early, and how often each of them counted."""
        counts = np.zeros(self.num_threads, np.int64)
        return self._checked(self._library.hr_pool_barrier_test(self._pool, runs, barriers, counts.ctypes.data)), [
            *counts.tolist()
        ]

    def steps(self, steps: Steps) -> list[float]:
        """hr_pool_steps_test: milliseconds of each."""
        nanoseconds = np.zeros(max(steps.steps, 1), np.int64)
        self._checked(self._library.hr_pool_steps_test(self._pool, ctypes.byref(steps), nanoseconds.ctypes.data))
        return [float(ns) / 1e6 for ns in nanoseconds]

    def close(self) -> None:
        """Ends its threads."""
        self._library.hr_pool_destroy(self._pool)
        self._pool = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _checked(self, result: int) -> int:
        if result < 0:
            raise RuntimeError(last_error())
        return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.25, help="of one policy in one round")
    parser.add_argument("--beside", default=",".join(BESIDE))
    parser.add_argument("--work", default="arithmetic,memory")
    parser.add_argument("--forms", default="units,barrier")
    parser.add_argument("--spin-us", default="5,20,50,100,200,1000,1000000")
    parser.add_argument("--yields", default="0,1")
    parser.add_argument("--pinned", default="0,1")
    parser.add_argument("--most-foreign", type=float, default=0.15, help="cores that other processes took")
    options = parser.parse_args()
    policies = [
        Policy(form, float(spin), yields == "1", pinned == "1")
        for form, spin, yields, pinned in itertools.product(
            *(getattr(options, name).split(",") for name in ("forms", "spin_us", "yields", "pinned"))
        )
    ]
    rounds: dict[tuple[str, str, Policy], list[tuple[float, list[float]]]] = defaultdict(list)
    for _, work, beside in itertools.product(range(options.rounds), options.work.split(","), options.beside.split(",")):
        with busy_processes(*BESIDE[beside]) as hogs:
            for policy in policies:
                rounds[work, beside, policy].append(measure(policy, work, options.threads, options.seconds, hogs))
    for (work, beside, policy), measured in rounds.items():
        kept = [each for each in measured if each[0] <= options.most_foreign]
        used = kept or [min(measured)]
        steps = [milliseconds for _, milliseconds in used]
        line: dict[str, object] = {"op": "pool", "work": work, "beside": beside, **asdict(policy)}
        line["mean_ms"] = round(statistics.median(statistics.mean(ms) for ms in steps), 2)
        line["median_ms"] = round(statistics.median(statistics.median(ms) for ms in steps), 2)
        line["p99_ms"] = round(statistics.median(sorted(ms)[int(len(ms) * 0.99)] for ms in steps), 2)
        line |= {"rounds": len(kept), "foreign": round(statistics.median(foreign for foreign, _ in used), 2)}
        print(json.dumps(line), flush=True)
    for is_pinned in (False, True):
        print(json.dumps({"op": "barrier", "is_pinned": is_pinned, "ns": barrier_ns(options.threads, is_pinned)}))


def measure(
    policy: Policy, work: str, threads: int, seconds: float, hogs: list[subprocess.Popen[bytes]]
) -> tuple[float, list[float]]:
    """(cores taken by other processes than this one and the hogs, milliseconds of each step)."""
    streams = work == "memory"
    spin_ns = int(policy.spin_us * 1000)
    steps = Steps(
        unit_work=MEMORY // (PHASES * UNITS) // 64 * 64 if streams else ARITHMETIC,
        memory_bytes=MEMORY if streams else 0,
        gap_ns=100_000,  # Python between two steps
        spin_ns=spin_ns,
        steps=4,
        phases=PHASES,
        units=UNITS,
        streams=streams,
        meets=policy.form == "barrier",
        yields=policy.yields,
    )
    with Pool(threads, spin_ns=spin_ns, idle_spin_ns=spin_ns, is_pinned=policy.is_pinned, yields=policy.yields) as pool:
        pool.steps(steps)
        before, start, found = foreign_seconds(hogs), time.perf_counter(), list[float]()
        while time.perf_counter() - start < seconds:
            found += pool.steps(steps)
        return (foreign_seconds(hogs) - before) / (time.perf_counter() - start), found


def barrier_ns(threads: int, is_pinned: bool) -> float:
    """The best of short runs, as long as nobody else wants a core."""
    with Pool(threads, is_pinned=is_pinned) as pool:
        best = float("inf")
        for _ in range(200):
            start = time.perf_counter()
            pool.barriers(1, 500)
            best = min(best, (time.perf_counter() - start) / 1000)
    return round(best * 1e9, 1)


def foreign_seconds(hogs: list[subprocess.Popen[bytes]]) -> float:
    """CPU time of all processes but this one and the hogs."""
    tick = os.sysconf("SC_CLK_TCK")
    user, nice, system = (int(field) for field in Path("/proc/stat").read_text().split(None, 4)[1:4])
    own = time.process_time()
    for hog in hogs:
        fields = Path(f"/proc/{hog.pid}/stat").read_text().rpartition(")")[2].split()
        own += (int(fields[11]) + int(fields[12])) / tick
    return (user + nice + system) / tick - own


@contextmanager
def busy_processes(count: int, niceness: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Busy loops, in the session of this process: the scheduler treats sessions apart."""
    loop = f"import os\nos.nice({niceness})\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        time.sleep(0.2)  # until they are past their start
        yield hogs
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


if __name__ == "__main__":
    main()
