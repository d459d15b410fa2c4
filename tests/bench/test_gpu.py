"""bench/gpu.py and bench/tune.py as far as they go without a GPU: plans, the table that is written, operands."""

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
    assert plan["peers"]["cublas"]
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
def test_operands_lie_as_packed_ones_do(kind: str, is_gated: bool) -> None:
    import _gpu
    import torch

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
    got = _gpu.random_packed(kind, n, k, is_gated=is_gated, device="cpu")
    assert (got.kind, got.shape, got.rows, got.is_gated) == (want.kind, want.shape, want.rows, want.is_gated)
    for name, tensor in got.tensors.items():
        assert tensor.shape[:2] == want.tensors[name].shape[:2], name
        if name in ("words", "weight"):
            assert (tensor.shape, tensor.dtype) == (want.tensors[name].shape, want.tensors[name].dtype), name
