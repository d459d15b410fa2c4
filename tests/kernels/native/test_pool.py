"""The pool of threads behind the native executor: everybody works, nobody runs ahead, and an idle pool costs nothing.

Run in a build with the thread sanitizer (`make native-sanitize`) the counting in `barriers` is the race detector's
test: nothing in it is atomic but what the pool does.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from headrace.kernels.native.library import load

from bench.ops.pool import Pool, Steps

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="threads are looked at in /proc, and bound, on Linux only")


def small_steps(num: int = 20, *, meets: bool = False, spin_ns: int = 50_000) -> Steps:
    return Steps(unit_work=10, steps=num, phases=50, units=7, meets=meets, spin_ns=spin_ns)


def usable_cores() -> int:
    """Physical cores that this process may run on."""
    path = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return len({Path(path.format(cpu)).read_text() for cpu in os.sched_getaffinity(0)})


def workers() -> dict[int, str]:
    """Thread id -> /proc's status, of the pools' threads in this process."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        status = (task / "status").read_text()
        if status.partition("\n")[0].partition("\t")[2].startswith("headrace-"):
            found[int(task.name)] = status
    return found


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5, 8])
def test_each_thread_works_once_per_run_and_none_runs_ahead(num_threads: int) -> None:
    # More threads than cores as well: whoever waits must leave the core to whoever is waited for.
    with Pool(num_threads) as pool:
        assert pool.barriers(1, 0) == (0, [0] * num_threads)
        assert pool.barriers(30, 5) == (0, [150] * num_threads)


@pytest.mark.parametrize("spin_ns", [0, 1_000, 50_000])
def test_thousands_of_short_runs(spin_ns: int) -> None:
    with Pool(2, spin_ns=spin_ns, idle_spin_ns=spin_ns) as pool:
        assert pool.barriers(3000, 1) == (0, [3000, 3000])


@pytest.mark.parametrize("yields", [False, True])
@pytest.mark.parametrize("num_threads", [1, 2, 4])
def test_steps_end_however_threads_wait(num_threads: int, yields: bool) -> None:
    with Pool(num_threads, yields=yields) as pool:
        for meets in (False, True):
            assert len(pool.steps(small_steps(meets=meets))) == 20
        assert len(pool.steps(small_steps(200, spin_ns=0))) == 200
        assert pool.barriers(5, 2) == (0, [10] * num_threads)


def test_several_pools_at_once() -> None:
    results = []

    def use(num_threads: int) -> None:
        with Pool(num_threads) as pool:
            results.append(pool.barriers(50, 2) == (0, [100] * num_threads))

    threads = [threading.Thread(target=use, args=(n,)) for n in (1, 2, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_a_pool_that_nobody_uses_costs_no_processor_time() -> None:
    with Pool(4) as pool:
        pool.barriers(1, 1)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.01


def test_a_pool_is_destroyed_in_its_sleep_and_at_once() -> None:
    for pause in (0, 0, 0.01):
        pool = Pool(3)
        pool.barriers(1, 1)
        time.sleep(pause)
        pool.close()
    Pool(3).close()  # perhaps before its threads have begun


@LINUX
def test_threads_have_names_and_leave_signals_to_python() -> None:
    with Pool(3) as pool:
        pool.barriers(1, 1)
        found = workers()
        assert sorted(status.split()[1] for status in found.values()) == ["headrace-1", "headrace-2"]
        for status in found.values():
            [blocked] = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigBlk")]
            for number in (1, 2, 15, 10, 17):  # HUP, INT, TERM, USR1, CHLD
                assert blocked >> (number - 1) & 1
            for number in (11, 7, 8):  # SEGV, BUS, FPE: an instruction's own, for faulthandler
                assert not blocked >> (number - 1) & 1
    assert workers() == {}


@LINUX
def test_pinned_threads_have_a_core_each_and_the_caller_gets_its_own_back() -> None:
    before, cores = os.sched_getaffinity(0), usable_cores()
    with Pool(2, is_pinned=True) as pool:
        assert pool.barriers(10, 1) == (0, [10, 10])
        assert pool.is_pinned == (cores >= 2)
        if pool.is_pinned:
            [worker] = workers()
            own, other = os.sched_getaffinity(0), os.sched_getaffinity(worker)
            assert len(own) == len(other) == 1
            assert own | other <= before
            assert own != other
    assert os.sched_getaffinity(0) == before


@LINUX
def test_more_threads_than_cores_are_not_pinned() -> None:
    before = os.sched_getaffinity(0)
    with Pool(usable_cores() + 1, is_pinned=True) as pool:
        assert not pool.is_pinned
        assert os.sched_getaffinity(0) == before


@LINUX
def test_the_environment_decides_about_pinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_NATIVE_PIN", "0")
    with Pool(2, is_pinned=True) as pool:
        assert not pool.is_pinned
    monkeypatch.setenv("HEADRACE_NATIVE_PIN", "1")
    cores = usable_cores()
    with Pool(2) as pool:
        assert pool.is_pinned == (cores >= 2)


@LINUX
def test_a_pool_that_another_thread_closes_gives_the_first_its_cores_back() -> None:
    before = os.sched_getaffinity(0)
    pool = Pool(2, is_pinned=True)
    closer = threading.Thread(target=pool.close)
    closer.start()
    closer.join()
    assert os.sched_getaffinity(0) == before


FORK = """
import os, sys, warnings
from bench.ops.pool import Pool
warnings.simplefilter("ignore")  # that forking with threads is unwise
pool = Pool(3)
pool.barriers(1, 1)
child = os.fork()
if child == 0:
    alone = pool.barriers(2, 3) == (12, [6, 0, 0])  # it sees two that never count
    pool.close()
    worked = True
    if "TSAN_OPTIONS" not in os.environ:  # the thread sanitizer knows no threads that a forked child starts
        with Pool(2) as own:
            worked = own.barriers(5, 1) == (0, [5, 5])
    sys.exit(0 if alone and worked else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert pool.barriers(2, 1) == (0, [2] * 3)
pool.close()
sys.exit(status)
"""


@LINUX
def test_a_forked_child_is_alone_and_ends() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_ends_beside_a_pool_that_is_not_closed() -> None:
    code = "from bench.ops.pool import Pool\npool = Pool(4)\npool.barriers(1, 1)"
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_does_not_fit_is_refused_with_a_reason() -> None:
    for count in (0, -1, 100_000):
        with pytest.raises(RuntimeError, match=f"{count} threads are out of range"):
            Pool(count)
    with Pool(2) as pool:
        with pytest.raises(RuntimeError, match="0 runs"):
            pool.barriers(0, 1)
        with pytest.raises(RuntimeError, match="0 steps"):
            pool.steps(Steps(steps=0, phases=1, units=1))
        with pytest.raises(RuntimeError, match="negative"):
            pool.steps(Steps(steps=1, phases=1, units=1, unit_work=-1))
        with pytest.raises(RuntimeError, match="more than the memory"):
            pool.steps(Steps(steps=1, phases=1, units=1, unit_work=64, streams=1))
    assert load().hr_pool_steps_test(None, None, None) == -1
