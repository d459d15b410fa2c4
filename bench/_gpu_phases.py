"""The phases of bench/gpu.py, each run by it as a process of its own: `_gpu_phases.py NAME SECONDS [--rehearse]`.

Every result is one JSON object on a line, printed as soon as it is there. A phase ends by itself before its seconds are
over; what one kernel or peer refuses is a line with its error, and the others still count.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from _common import ROOT

sys.path.insert(0, str(ROOT))  # a rehearsal uses the tests' interpreter and models

import _gpu
import _gpu_peers
import numpy as np
import tune
from headrace.kernels.batch import RowSampling, StepBatch


def say(**values: Any) -> None:
    """One result."""
    print(json.dumps(values), flush=True)


def attempt(measure: Callable[[], dict[str, Any]], **what: Any) -> None:
    """Say what it measures, or its error."""
    try:
        say(**what, **measure())
    except Exception as error:
        say(**what, error=f"{type(error).__name__}: {error}"[:300])


# --- numerics


def numerics(end: float) -> None:
    """A process per file, several at a time: compiling is most of it, and needs a CPU."""
    files = [*(ROOT / "tests/gpu/numerics").glob("test_*.py"), ROOT / "tests/gpu/e2e/test_executor.py"]
    if _gpu.is_rehearsal():
        files = [ROOT / "tests/gpu/numerics/test_convert.py"]
    with ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        futures = [pool.submit(_test_file, path, end) for path in sorted(files, key=lambda path: -path.stat().st_size)]
        counts = [future.result() for future in as_completed(futures)]
    passed, failed, unfinished = (sum(column) for column in zip(*counts, strict=True))
    say(passed=passed, failed=failed, unfinished_files=unfinished)


def _test_file(path: Path, end: float) -> tuple[int, int, int]:
    """Tests that passed and failed, and 1 where time ran out."""
    command = [sys.executable, "-m", "pytest", "-v", "--tb=line", "-p", "no:cacheprovider", str(path)]
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            status: int | str = process.wait(max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = "out of time"
        output.seek(0)
        text = output.read()
    outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR)\b", text, re.MULTILINE)
    passed = sum(outcome == "PASSED" for _, outcome in outcomes)
    bad = [name.split("::", 1)[1] for name, outcome in outcomes if outcome != "PASSED"]
    tail = [] if status == 0 else text.strip().splitlines()[-6:]
    say(file=path.name, status=status, passed=passed, failed=len(bad), which=bad[:10], tail=tail)
    return passed, len(bad), int(status == "out of time")


# --- tuning


def tuning(end: float) -> None:
    """Every entry is written as it is found."""
    todo = list(tune.jobs(list(_gpu.scale.models), ["int4"], list(_gpu.scale.tuned_rows)))
    if _gpu.is_rehearsal():
        todo = [*todo[:1], *todo[-1:]]
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) if _gpu.is_rehearsal() else tune.tuning.FOLDER
        gpu = _gpu.gpu_line() or {"gpu": "rehearsal", "arch": "interpreter", "triton": "3.6.0"}
        entries = 0
        for entry in tune.tune(todo, end, say):
            entries += 1
            say(entry=entry, table=tune.write_table([entry], gpu, where).name)
    say(jobs=len(todo), entries=entries)


# --- times


def times(end: float) -> None:
    """Our kernels beside their floors and their peers."""
    bandwidth = _gpu.copy_bandwidth()
    say(op="copy", gb_per_s=round(bandwidth, 1))
    for what, measure in (*_attention_measures(bandwidth), *_product_measures(bandwidth)):
        if time.monotonic() > end:
            say(stopped="out of time", before=what)
            return
        attempt(measure, **what)


def _attention_measures(bandwidth: float) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    for case in _gpu.attention_cases():
        yield {"op": "paged_attention", "shape": str(case)}, lambda case=case: _time_attention(case, bandwidth)


def _time_attention(case: _gpu.AttentionCase, bandwidth: float) -> dict[str, Any]:
    runs = _gpu.attention_runs(_gpu.attention_operands(case))
    ours = _gpu.microseconds(runs(_gpu.attention_config(case)), 16)
    floor = case.kv_bytes / bandwidth / 1e3
    row: dict[str, Any] = {"us": round(ours, 1), "floor_us": round(floor, 1), "of_copy": round(floor / ours, 3)}
    best: dict[str, float] = {}
    for name, run in _gpu_peers.attention(case):
        found = _time_peer(run)
        if isinstance(found, float):
            best[name] = found
        row[f"{name}_us"] = round(found, 1) if isinstance(found, float) else found
    row |= _gpu_peers.flash(case)
    if case.query_len == 1:
        return row | {"goals": {"decode_attention": row["of_copy"]}}
    row["tflops"] = round(case.flops / ours / 1e6, 1)
    if best and case.query_len == case.context:  # SDPA is FlashAttention 2 there, where flash-attn is not installed
        name = min(best, key=lambda peer: best[peer])
        row |= {"fastest_peer": name, "goals": {"prefill_attention": round(best[name] / ours, 3)}}
    return row


def _time_peer(run: Callable[[], Any]) -> float | str:
    """Microseconds, or what the peer says instead."""
    try:
        return _gpu.microseconds([run], 16)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def _product_measures(bandwidth: float) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    for m, (name, n, k, is_gated) in _gpu.timed_products():
        what = {"op": "linear", "shape": f"{name} {m} x {n} x {k}, int4 groups of 32 with zeros"}
        yield what, lambda m=m, n=n, k=k, is_gated=is_gated: _time_product(n, k, m, is_gated, bandwidth)


def _time_product(n: int, k: int, m: int, is_gated: bool, bandwidth: float) -> dict[str, Any]:
    from dataclasses import replace

    from headrace.kernels.gpu import tuning as tables
    from headrace.kernels.linear.triton import default_for

    gpu = _gpu.gpu_line() or {"gpu": "", "arch": ""}
    shape = {"kind": "int4", "n": n, "k": k, "group_size": 32, "gated": int(is_gated)}
    found = tables.lookup("linear", gpu["gpu"], gpu["arch"], m=m, **shape)
    weight = _gpu.random_packed("int4", n, k, is_gated=is_gated)
    config = replace(default_for(weight, m), **found)
    ours = _gpu.microseconds(_gpu.product_runs("int4", n, k, m, is_gated=is_gated)(config))
    cublas = _gpu.microseconds(_gpu_peers.cublas(n, k, m))
    row = {
        "is_tuned": bool(found),
        "us": round(ours, 1),
        "floor_us": round(weight.num_bytes / bandwidth / 1e3, 1),
        "cublas_bf16_us": round(cublas, 1),
        "over_cublas": round(cublas / ours, 2),
        **({"goals": {"w4a16": round(cublas / ours, 2)}} if m <= 16 else {}),
    }
    try:
        return row | _gpu_peers.marlin(n, k, m)
    except Exception as error:
        return row | {"vllm_marlin_error": f"{type(error).__name__}: {error}"[:200]}


# --- steps


def steps(end: float) -> None:
    """Decode steps of the default model, one in flight."""
    from headrace.kernels.gpu.executor import GpuExecutor, GpuOptions
    from headrace.kernels.gpu.shape import StepLimits
    from headrace.models.load import load_model

    path, options = _model()
    model = load_model(path)
    most = max(_gpu.scale.decode_seqs)
    limits = StepLimits(max_tokens=512, max_seqs=most, max_logit_rows=256, max_model_len=2048, block_size=64)
    if _gpu.is_rehearsal():
        limits = StepLimits(max_tokens=64, max_seqs=most, max_logit_rows=8, max_model_len=128, block_size=64)
    context = limits.max_model_len // 2
    executor = GpuExecutor(model.program, model.weights, limits, GpuOptions(**options))
    executor.allocate_kv(most * context // 64)
    executor.warm_up()
    say(executor=executor.summary())
    for num_seqs in _gpu.scale.decode_seqs:
        if time.monotonic() > end:
            say(stopped="out of time", num_seqs=num_seqs)
            return
        attempt(lambda num_seqs=num_seqs: _time_steps(executor, num_seqs, context), num_seqs=num_seqs)


def _model() -> tuple[Path, dict[str, Any]]:
    """The default model; for a rehearsal a tiny one, whose options differ."""
    from headrace.models.sources import resolve
    from headrace.server.config import ServerConfig

    if not _gpu.is_rehearsal():
        return resolve(ServerConfig.model), {}
    from tests.conftest import TinyModels

    path = TinyModels(Path(tempfile.mkdtemp())).gguf("llama-smallest")
    return path, {"compute_dtype": "fp32", "kv_dtype": "fp32", "device": "cpu", "has_graphs": False}


def _time_steps(executor: Any, num_seqs: int, context: int) -> dict[str, Any]:
    import torch

    known, pending = (decode_batch(num_seqs, is_pending=flag, context=context) for flag in (False, True))
    executor.execute(known)
    begin = time.perf_counter()
    executor.submit(pending)
    for _ in range(_gpu.scale.steps):
        executor.submit(pending)
        executor.collect()
    executor.collect()
    wall = (time.perf_counter() - begin) / (_gpu.scale.steps + 1) * 1e6
    if _gpu.is_rehearsal():
        return {"step_us": round(wall, 1)}
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(_gpu.scale.steps):
        executor.replay(num_seqs)
    events[1].record()
    events[1].synchronize()
    graph = events[0].elapsed_time(events[1]) / _gpu.scale.steps * 1e3
    gap = round(1.0 - graph / wall, 3)
    return {"step_us": round(wall, 1), "graph_us": round(graph, 1), "gap": gap, "goals": {"launch_gap": gap}}


def decode_batch(num_seqs: int, *, is_pending: bool, context: int, block_size: int = 64) -> StepBatch:
    """One row of each of `num_seqs` sequences; is_pending: from the tokens that the step before samples."""
    rows = np.arange(num_seqs, dtype=np.int32)
    blocks = context // block_size
    tables = np.arange(num_seqs * blocks, dtype=np.int32).reshape(num_seqs, blocks)
    return StepBatch(
        token_ids=-1 - rows if is_pending else rows,
        positions=np.full(num_seqs, context - 1, np.int32),
        slot_mapping=tables[:, -1] * block_size + (context - 1) % block_size,
        cu_seqlens_q=np.arange(num_seqs + 1, dtype=np.int32),
        seq_lens=np.full(num_seqs, context, np.int32),
        block_tables=tables,
        logit_rows=rows,
        sampling=tuple(RowSampling(position=context) for _ in range(num_seqs)),
    )


# --- server


def server(end: float) -> None:
    """`headrace bench` against a server of its own, at few streams and at many."""
    environment = {**os.environ, "HEADRACE_BACKEND": "triton"}
    model: list[str] = []
    if _gpu.is_rehearsal():
        environment["HEADRACE_COMPUTE_DTYPE"] = "fp32"
        model = ["--model", str(_model()[0])]
    for concurrency, requests in _gpu.scale.loads:
        left = end - time.monotonic()
        if left < 15:
            say(concurrency=concurrency, status="out of time")
            return
        command = [sys.executable, "-m", "headrace.server.cli", "bench", "--json", *model]
        command += ["--concurrency", str(concurrency), "--requests", str(requests)]
        command += ["--prompt-tokens", str(_gpu.scale.prompt_tokens)]
        command += ["--output-tokens", str(_gpu.scale.output_tokens)]
        attempt(lambda command=command, left=left: _load(command, environment, left), concurrency=concurrency)


def _load(command: list[str], environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Raises TimeoutExpired; what it started ends with this process's group."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        return {"status": done.returncode, "error": done.stderr[-500:]}
    return {"result": json.loads(done.stdout)}


PHASES = {"numerics": numerics, "tune": tuning, "times": times, "steps": steps, "server": server}


def main() -> None:
    name, seconds = sys.argv[1], float(sys.argv[2])
    end = time.monotonic() + seconds
    if "--rehearse" in sys.argv[3:]:
        _gpu.rehearse()
    PHASES[name](end)


if __name__ == "__main__":
    main()
