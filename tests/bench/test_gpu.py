"""bench/gpu.py and bench/tune.py as far as they go without a GPU: plans, what a broken phase leaves, tables, operands.

That every phase reaches its end is tested by tests/gpu/test_rehearsal.py, which has Triton's interpreter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.kernels.gpu import tuning
from headrace.kernels.linear import pack
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.quant import QuantTensor, pack_int4

ROOT = Path(__file__).parent.parent.parent


def lines_of(script: str, *arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "bench" / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_the_whole_run_takes_less_than_nine_minutes() -> None:
    *phases, plan = lines_of("gpu.py", "--dry-run")
    assert [phase["phase"] for phase in phases] == ["numerics", "tune", "times", "steps", "server"]
    assert plan["seconds"] == sum(phase["seconds"] for phase in phases) < 540
    assert plan["attention"]
    assert plan["products"]
    assert set(plan["peers"]) >= {"cublas", "sdpa", "flash-attn", "flash-attn-4", "vllm-marlin"}
    assert all(isinstance(why, str) for why in plan["peers"].values())
    assert sorted(plan["targets"].values()) == [0.03, 0.7, 0.85, 3.2]
    assert len(lines_of("gpu.py", "--dry-run", "--only", "times")) == 2


def test_what_would_be_tuned_is_what_the_executor_looks_up() -> None:
    *jobs, plan = lines_of("tune.py", "--dry-run", "--models", "llama-3-8b", "--rows", "16")
    assert plan["jobs"] == len(jobs) == 1 + 5
    assert {job["op"] for job in jobs} == set(tuning.ORDER)
    (gate_up,) = [job for job in jobs if job["shape"].get("gated")]
    assert gate_up["shape"] == {"kind": "int4", "n": 2 * 14336, "k": 4096, "group_size": 32, "gated": 1}
    assert gate_up["candidates"] > 4


@pytest.fixture
def _bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


PHASE = """
import json, os, sys, time
print(json.dumps({"goals": {"w4a16": 3.5}, "us": 1.0}), flush=True)
print("a library says hello", flush=True)
print(json.dumps({"goals": {"w4a16": 2.5, "launch_gap": 0.01}}), flush=True)
if sys.argv[1] == "steps":
    os.abort()  # as a lost device or a fault in a kernel's launcher would
if sys.argv[1] == "server":
    time.sleep(60)
"""


@pytest.mark.usefixtures("_bench_path")
def test_a_phase_that_breaks_or_hangs_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu

    (tmp_path / "_gpu_phases.py").write_text(PHASE)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    results = gpu.Results({"gpu": "a GPU"}, save=True)
    phases = {phase.name: phase for phase in gpu.PHASES}
    limits = {"steps": 60.0, "server": 3.0, "times": 60.0}  # seconds
    ends = [gpu.run_phase(phases[name], limit, results, rehearse=False) for name, limit in limits.items()]
    results.targets()
    assert ends == [False, False, True]
    printed, saved = capsys.readouterr(), (tmp_path / "gpu.jsonl").read_text()
    assert printed.out == saved
    assert "hello" in printed.err
    lines = [json.loads(line) for line in saved.splitlines()]
    assert all(line["gpu"] == "a GPU" for line in lines)
    outcomes = {line["name"]: line["outcome"] for line in lines if line["phase"] == "phase"}
    assert outcomes == {"steps": "failed with status -6", "server": "stopped: out of time", "times": "done"}
    first = next(line for line in lines if "us" in line)
    assert first["goals"] == {"w4a16": {"reached": 3.5, "goal": 3.2, "passed": True}}
    reached = {line["target"][:5]: line for line in lines if line["phase"] == "targets"}
    assert (reached["W4A16"]["worst"], reached["W4A16"]["best"], reached["W4A16"]["passed"]) == (2.5, 3.5, False)


@pytest.mark.usefixtures("_bench_path")
def test_a_target_is_at_least_or_at_most(capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    results = gpu.Results({}, save=False)
    results("steps", goals={"launch_gap": 0.01})
    results("steps", goals={"launch_gap": 0.05})
    results.targets()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["goals"]["launch_gap"]["passed"] for line in lines[:2]] == [True, False]
    by_target = {line["target"]: line for line in lines[2:]}
    gap = next(line for target, line in by_target.items() if "between launches" in target)
    assert (gap["worst"], gap["best"], gap["passed"]) == (0.05, 0.01, False)
    assert next(line for target, line in by_target.items() if "W4A16" in target)["passed"] is None


@pytest.mark.usefixtures("_bench_path")
def test_tuning_goes_on_after_a_shape_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    import _gpu
    import tune

    todo = list(tune.jobs(["tiny"], ["int4"], [16]))
    attention, first, *_ = todo
    said: list[dict[str, Any]] = []
    times = iter([3.0, 1.0, 2.0, 9.0, 5.0])

    def runners(job: tune.Job) -> list[tune.Runner]:
        if job.op == "linear":
            raise RuntimeError("no memory")
        return [lambda candidate: [lambda: None] for _ in job.parts]

    monkeypatch.setattr(tune, "_runners", runners)
    monkeypatch.setattr(_gpu, "microseconds", lambda runs, launches: next(times, 4.0))
    end = time.monotonic() + 60
    (entry,) = tune.tune([first, attention], end, lambda **values: said.append(values))
    assert said[0]["failed"] == "linear"
    assert "no memory" in said[0]["error"]
    decode, prefill = attention.parts
    assert entry["config"] == {**decode[1], **prefill[0]}
    assert entry["microseconds"] == 1.0
    said.clear()
    assert list(tune.tune(todo, time.monotonic() - 1, lambda **values: said.append(values))) == []
    assert said == [{"tuned": 0, "of": len(todo), "stopped": "out of time"}]


@pytest.mark.usefixtures("_bench_path")
def test_a_table_is_written_so_that_it_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tune

    gpu = {"gpu": "NVIDIA H100", "arch": "sm_90", "triton": "3.6.0"}
    shape = {"kind": "int4", "n": 64, "k": 32, "group_size": 32, "gated": 0}
    entry = {"op": "linear", "shape": shape, "m": 16, "config": {"block_n": 64}, "microseconds": 2.0}
    tune.write_table([entry], gpu, tmp_path)
    path = tune.write_table([{**entry, "m": 64}, {**entry, "config": {"block_n": 128}}], gpu, tmp_path)
    table = tuning.load_table(path)
    monkeypatch.setattr(tuning, "load_tables", lambda: (table,))
    assert tuning.lookup("linear", "NVIDIA H100", "sm_90", m=5, **shape) == {"block_n": 128}  # the newer one
    assert tuning.lookup("linear", "NVIDIA H100", "sm_90", m=64, **shape) == {"block_n": 64}
    for m in (1, 16, 64, 512):
        assert all(isinstance(config, LinearConfig) for config in tune.linear_candidates(m))


@pytest.mark.usefixtures("_bench_path")
@pytest.mark.parametrize("kind", ["int4", "int8", "dense"])
@pytest.mark.parametrize("is_gated", [False, True])
def test_operands_lie_as_packed_ones_do(kind: str, is_gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import _gpu
    import torch

    monkeypatch.setattr(_gpu, "scale", _gpu.Scale(device="cpu"))

    n, k = 96, 256
    rng = np.random.default_rng(1)

    def weight(rows: int) -> Any:
        scales, zeros = (rng.random((rows, k // 32), np.float32) for _ in "sz")
        if kind == "dense":
            return rng.random((rows, k), np.float32)
        if kind == "int8":
            return QuantTensor("int8", rng.integers(-128, 128, (rows, k)).astype(np.int8), scales, zeros, 32)
        return QuantTensor("int4", pack_int4(rng.integers(0, 16, (rows, k)).astype(np.uint8)), scales, zeros, 32)

    weights = [weight(n // 2), weight(n // 2)] if is_gated else [weight(n)]
    want = pack(weights, dtype=torch.bfloat16, is_gated=is_gated)
    # Scales of the test are rounded to half where they fit, as those of real files do.
    got = _gpu.random_packed(kind, n, k, is_gated=is_gated)
    assert (got.kind, got.shape, got.rows, got.is_gated) == (want.kind, want.shape, want.rows, want.is_gated)
    for name, tensor in got.tensors.items():
        assert tensor.shape[:2] == want.tensors[name].shape[:2], name
        if name in ("words", "weight"):
            assert (tensor.shape, tensor.dtype) == (want.tensors[name].shape, want.tensors[name].dtype), name
