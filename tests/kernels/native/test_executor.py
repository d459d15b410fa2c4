"""The native executor where it is more than the sum of its ops: order of rows, isolation, memory, threads."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from headrace.kernels.batch import RowSampling
from headrace.kernels.native import library
from headrace.kernels.native.executor import PROFILE_VARIABLE, NativeExecutor
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.stepping import logits_in_chunks, step_batch

ROOT = Path(__file__).parents[3]
BLOCK = 4


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> LoadedModel:
    return load_model(tiny_models.gguf("llama", "Q4_1"))


def make(model: LoadedModel, num_blocks: int = 12, **options: Any) -> NativeExecutor:
    options = {"num_threads": 2, "max_num_batched_tokens": 16, "max_logit_rows": 8, **options}
    return NativeExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=BLOCK, **options)


@pytest.fixture(scope="module")
def executor(model: LoadedModel) -> NativeExecutor:
    return make(model)


GOOD = step_batch([([5, 6, 7], 0, [2]), ([8, 9], 0, [4])], BLOCK)


def test_results_follow_logit_rows(model: LoadedModel) -> None:
    everything = make(model).forward(GOOD)
    some = replace(GOOD, logit_rows=np.array([0, 2, 4], np.int32), sampling=(RowSampling(),) * 3)
    executor = make(model)
    np.testing.assert_array_equal(executor.forward(some), everything[[0, 2, 4]])
    assert [result.token_id for result in executor.execute(some)] == everything[[0, 2, 4]].argmax(1).tolist()


def test_a_step_may_want_no_logits(model: LoadedModel) -> None:
    executor = make(model)
    batch = step_batch([([5, 6, 7], 0, [2])], BLOCK)
    assert executor.execute(replace(batch, logit_rows=np.zeros(0, np.int32), sampling=())) == []
    after = executor.forward(step_batch([([8], 3, [2])], BLOCK))
    want = logits_in_chunks(make(model), [5, 6, 7, 8], 4, [7], BLOCK)[-1:]  # type: ignore[arg-type]
    np.testing.assert_array_equal(after, want)


def test_rows_are_sampled_as_they_ask(model: LoadedModel) -> None:
    """One step with every kind of row: greedy, drawn, scored, biased, banned, penalised, with log-probabilities."""
    from headrace.kernels.sample import sample

    executor = make(model)
    batch = step_batch([([5, 6, 7, 8, 9, 10, 11], 0, [2, 3])], BLOCK)
    greedy = int(executor.forward(batch)[1].argmax())
    rows = (
        RowSampling(),
        RowSampling(banned=(greedy,)),
        RowSampling(temperature=0.8, top_k=20, seed=3, position=9, num_logprobs=2),
        RowSampling(target=17, num_logprobs=0),
        RowSampling(logit_bias=((40, 100.0),)),
        RowSampling(repetition_penalty=1.7, prompt_ids=[5, 6, 7], output_ids=[greedy], presence_penalty=0.5),
        RowSampling(temperature=1.2, top_p=0.7, min_p=0.01, seed=5, position=3),
    )
    batch = replace(batch, sampling=rows)
    want = sample(executor.forward(batch), rows)
    got = executor.execute(batch)
    assert [r.token_id for r in got] == [r.token_id for r in want]
    assert got[4].token_id == 40
    np.testing.assert_allclose([r.logprob for r in got], [r.logprob for r in want], atol=1e-5)
    assert [[i for i, _ in r.top] for r in got] == [[i for i, _ in r.top] for r in want]


def test_what_a_freed_block_holds_reaches_nobody(tiny_models: TinyModels) -> None:
    """A sequence of NaN (a fault of the model) leaves its blocks to others, which run beside it and after it."""
    model = load_model(tiny_models.gguf("llama3"))  # its output head is not the embedding
    table = np.array(model.weights["token_embd.weight"])
    table[9] = np.nan
    broken = replace(model, weights={**model.weights, "token_embd.weight": table})
    for kv_dtype in ("fp32", "fp16", "bf16", "int8"):
        executor = make(broken, num_blocks=4, kv_dtype=kv_dtype)
        clean = executor.forward(step_batch([([5, 6], 0, [0])], BLOCK))
        mixed = step_batch([([9, 9, 9, 9], 0, [2]), ([5, 6], 0, [0])], BLOCK, last_only=True)
        assert [result.is_finite for result in executor.execute(mixed)] == [False, True]
        after = executor.forward(step_batch([([5, 6], 0, [2])], BLOCK))
        np.testing.assert_array_equal(after, clean)
        decode = executor.execute(step_batch([([7], 2, [2]), ([7], 2, [0]), ([5], 0, [3])], BLOCK))
        assert all(result.is_finite for result in decode)


# ---- Memory, threads, names ----


def test_untouched_blocks_cost_nothing(model: LoadedModel) -> None:
    before = psutil.Process().memory_info().rss
    executor = make(model, num_blocks=1 << 16)  # 3 layers x 2 x 64 MiB of KV blocks
    executor.forward(step_batch([([5, 6, 7], 0, [60_000])], BLOCK))
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_name_says_what_computes(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in library.info().usable:
        monkeypatch.setenv(library.ISA_VARIABLE, isa)
        assert make(model).name == f"native-{isa}"
    monkeypatch.setenv(library.ISA_VARIABLE, "abacus")
    with pytest.raises(ValueError, match="cannot run here"):
        make(model)


def test_close_gives_the_threads_back(model: LoadedModel) -> None:
    before = psutil.Process().num_threads()
    executor = make(model, num_threads=4)
    assert psutil.Process().num_threads() == before + 3
    executor.close()
    executor.close()
    assert psutil.Process().num_threads() == before
    with pytest.raises(ValueError, match="closed"):
        executor.forward(GOOD)
    make(model, num_threads=3)  # dropped without a word
    gc.collect()
    assert psutil.Process().num_threads() == before


@pytest.mark.skipif(sys.platform != "linux", reason="threads change places on Linux alone")
def test_threads_may_run_where_they_might_before(model: LoadedModel) -> None:
    """Beside processes that take their cores away they change places, by their affinities; nobody else must see it."""
    executor = make(model, num_threads=3)
    want = executor.forward(GOOD)
    before = {thread.id: os.sched_getaffinity(thread.id) for thread in psutil.Process().threads()}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(before[os.getpid()]) + 1)]
    try:
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            np.testing.assert_array_equal(executor.forward(GOOD), want)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    after, end = {}, time.monotonic() + 20
    while after != before and time.monotonic() < end:  # one that has just moved gets its mask back when it runs again
        after = {thread: os.sched_getaffinity(thread) for thread in before}
    assert after == before


def test_the_interpreter_runs_on_while_a_step_computes(model: LoadedModel) -> None:
    """The call releases the GIL: two executors step at the same time, each on its own threads."""
    executors = [make(model, num_threads=1) for _ in range(2)]
    want = executors[0].forward(GOOD)
    wrong: list[int] = []

    def step(executor: NativeExecutor) -> None:
        wrong.extend(i for i in range(50) if not np.array_equal(executor.forward(GOOD), want))

    threads = [threading.Thread(target=step, args=(executor,)) for executor in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_profile(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = make(model)
    quiet.execute(GOOD)
    assert {op.nanoseconds for op in quiet.times()} == {0}
    monkeypatch.setenv(PROFILE_VARIABLE, "1")
    executor = make(model)
    executor.execute(GOOD)
    times = executor.times()
    assert [op.kind for op in times[:3]] == ["embed", "norm", "linear"]
    assert [op.kind for op in times[-2:]] == ["plan", "sample"]
    assert all(op.nanoseconds > 0 for op in times)
    assert times[1].name == "blk.0.attn_norm.weight"


COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
static atomic_long count;
static void *(*real_malloc)(size_t), *(*real_realloc)(void *, size_t);
static int (*real_aligned)(void **, size_t, size_t);
long allocations(void) { return count; }
void *malloc(size_t n) {
  if (!real_malloc) real_malloc = dlsym(RTLD_NEXT, "malloc");
  count++;
  return real_malloc(n);
}
void *realloc(void *p, size_t n) {
  if (!real_realloc) real_realloc = dlsym(RTLD_NEXT, "realloc");
  count++;
  return real_realloc(p, n);
}
int posix_memalign(void **p, size_t a, size_t n) {
  if (!real_aligned) real_aligned = dlsym(RTLD_NEXT, "posix_memalign");
  count++;
  return real_aligned(p, a, n);
}
"""

COUNTING = """
    import ctypes, sys
    sys.path.insert(0, {root!r})
    from headrace.kernels.batch import RowSampling
    from headrace.kernels.native.executor import NativeExecutor
    from headrace.models.load import load_model
    from dataclasses import replace
    from tests.support.stepping import step_batch
    counter = ctypes.CDLL({shim!r})
    counter.allocations.restype = ctypes.c_long
    model = load_model({model!r})
    before = counter.allocations()
    executor = NativeExecutor(model.program, model.weights, num_blocks=64, block_size=4, num_threads=3)
    assert counter.allocations() > before + 10
    sampling = RowSampling(temperature=0.9, top_k=9, top_p=0.8, repetition_penalty=1.3, prompt_ids=[4], num_logprobs=4)
    prefill = step_batch([(list(range(3, 100)), 0, list(range(30)))], 4)
    decode = step_batch([([i], 4 * i, list(range(30 + i, 40 + i))) for i in range(9)], 4)
    prefill, decode = (replace(b, sampling=(sampling,) * len(b.logit_rows)) for b in (prefill, decode))
    run, counts = executor._library.hr_executor_run, []
    def counted(*arguments):
        before = counter.allocations()
        status = run(*arguments)
        counts.append(counter.allocations() - before)
        return status
    class Library:
        hr_executor_run = staticmethod(counted)
    executor._library = Library
    for batch in (prefill, decode) * 3:
        executor.execute(batch)
    baseline = counter.allocations()
    baseline = counter.allocations() - baseline
    print(counts, baseline)
    assert baseline == 0
    assert counts[2:] == [0] * 4, counts
"""


def test_a_step_allocates_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Counted by a malloc of our own, preloaded into a process: around the native call, all threads, after one step of
    each kind. Its count is shown to work by the executor's own making."""
    if sys.platform != "linux" or "san" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("counts by LD_PRELOAD: Linux's alone, and a sanitizer's where one runs")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the tests need a C compiler"
    source, shim = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", str(source), "-o", str(shim), "-ldl"], check=True
    )
    script = textwrap.dedent(COUNTING).format(
        root=str(ROOT), shim=str(shim), model=str(tiny_models.gguf("llama", "Q4_1"))
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
