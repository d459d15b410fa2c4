"""Everything that only a GPU can tell, in one run of under 9 minutes on one GPU. JSON lines, each naming the GPU.

    python bench/gpu.py --save        append to bench/results/gpu.jsonl, write the tuning table of this GPU
    python bench/gpu.py --only times  one phase: numerics, tune, times, steps, server
    python bench/gpu.py --dry-run     what would run, and which peers are here; needs no GPU

Phases: the kernels' tests on the device; tuning to JSON; times against the floor (bytes over measured copy bandwidth)
and against the peers that can be imported (cuBLAS and SDPA through torch, flash-attn, vLLM's Marlin); decode steps, and
how much of them lies between launches; the server under load. Has not run on a GPU yet: no machine of this project had
one, and docs/KERNELS.md gives floors instead. What a peer's interface refuses is a line with its error.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import _gpu
import numpy as np
import tune
from _common import RESULTS, ROOT
from headrace.kernels.batch import RowSampling, StepBatch

STEPS = 64
PRODUCT_ROWS = (1, 4, 16, 64, 512)
PEERS = {
    "cublas": "torch",
    "sdpa": "torch",
    "flash-attn": "flash_attn",
    "flash-attn-4": "flash_attn.cute",
    "vllm": "vllm",
}
# The targets, printed beside what was measured.
TARGETS = {"decode_attention_of_copy": 0.85, "w4a16_over_cublas": 3.2, "prefill_over_flash": 0.7, "launch_gap": 0.03}


@dataclass(frozen=True)
class Phase:
    """A part of the run and the most seconds that it may take; together under 9 minutes."""

    name: str
    seconds: float
    run: Callable[[Reporter, float], None]


class Reporter:
    """Prints one JSON line per result, and keeps them for --save."""

    def __init__(self, gpu: dict[str, Any]) -> None:
        self._gpu = gpu
        self.lines: list[str] = []

    def __call__(self, phase: str, **values: Any) -> None:
        line = json.dumps({"bench": "gpu", "phase": phase, **values, **self._gpu})
        self.lines.append(line)
        print(line, flush=True)


def numerics(report: Reporter, seconds: float) -> None:
    """The kernels' tests and the executor's, on the device, as a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/gpu/numerics", "tests/gpu/e2e/test_executor.py"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
        report("numerics", status=done.returncode, summary=done.stdout.strip().splitlines()[-8:])
    except subprocess.TimeoutExpired:
        report("numerics", status="out of time")


def tuning(report: Reporter, seconds: float) -> None:
    """Tune Llama-3-8B's shapes, then the default model's; what time allows."""
    todo = list(tune.jobs(["llama-3-8b", "smollm2-135m"], ["int4"], [16, 64]))
    entries = tune.tune(todo, seconds)
    path = tune.write_table(entries, _gpu.gpu_line())
    report("tune", jobs=len(todo), entries=len(entries), table=path.name)


def times(report: Reporter, seconds: float) -> None:
    """Our kernels beside their floors and their peers."""
    end = time.monotonic() + seconds
    bandwidth = _gpu.copy_bandwidth()
    report("times", op="copy", gb_per_s=round(bandwidth, 1), targets=TARGETS)
    for measure in (*_attention_measures(bandwidth), *_product_measures(bandwidth)):
        if time.monotonic() > end:
            report("times", stopped="out of time")
            return
        try:
            report("times", **measure())
        except Exception as error:  # the other rows still count
            report("times", error=f"{type(error).__name__}: {error}"[:300])


def _attention_measures(bandwidth: float) -> Iterator[Callable[[], dict[str, Any]]]:
    for case in _gpu.attention_cases():

        def measure(case: _gpu.AttentionCase = case) -> dict[str, Any]:
            from headrace.kernels.paged_attention import AttentionConfig

            ours = _gpu.microseconds(_gpu.attention_runs(case)(AttentionConfig()), 16)
            row: dict[str, Any] = {
                "op": "paged_attention",
                "shape": f"{case.num_seqs} x {case.context}, {case.query_len} rows, kv {case.kv}",
                "us": round(ours, 1),
                "floor_us": round(case.kv_bytes / bandwidth / 1e3, 1),
                "of_copy": round(case.kv_bytes / bandwidth / 1e3 / ours, 3),
            }
            if case.query_len > 1:
                row["tflops"] = round(case.flops / ours / 1e6, 1)
            for name, run in _attention_peers(case):
                row[f"{name}_us"] = round(_gpu.microseconds([run], 16), 1)
            return row

        yield measure


def _attention_peers(case: _gpu.AttentionCase) -> Iterator[tuple[str, Callable[[], Any]]]:
    """SDPA on contiguous keys, and flash-attn where it is installed (decode: over its own contiguous cache)."""
    import torch
    import torch.nn.functional as F

    if case.kv != "bf16":
        return
    model = case.model
    shape = (case.num_seqs, case.context, model.kv_heads, model.head_dim)
    q = torch.randn(case.num_seqs, case.query_len, model.heads, model.head_dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    is_causal = case.query_len == case.context
    if is_causal or case.query_len == 1:
        heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        yield "sdpa", lambda: F.scaled_dot_product_attention(*heads_first, is_causal=is_causal, enable_gqa=True)
    if util.find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_with_kvcache

        lens = torch.full((case.num_seqs,), case.context, device="cuda", dtype=torch.int32)
        yield "flash_attn", lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lens, causal=True)


def _product_measures(bandwidth: float) -> Iterator[Callable[[], dict[str, Any]]]:
    model = _gpu.MODELS["llama-3-8b"]
    for m in PRODUCT_ROWS:
        for name, n, k, is_gated in model.products()[:4]:

            def measure(
                name: str = name, n: int = n, k: int = k, m: int = m, is_gated: bool = is_gated
            ) -> dict[str, Any]:
                from headrace.kernels.gpu import tuning as tables
                from headrace.kernels.linear.config import LinearConfig, default_config

                gpu = _gpu.gpu_line()
                shape = {"kind": "int4", "n": n, "k": k, "group_size": 32, "gated": int(is_gated)}
                found = tables.lookup("linear", gpu["gpu"], gpu["arch"], m=m, **shape)
                config = LinearConfig(**found) if found else default_config("int4", m)
                ours = _gpu.microseconds(_gpu.product_runs("int4", n, k, m, is_gated=is_gated)(config))
                cublas = _gpu.microseconds(_gpu.cublas_runs(n, k, m))
                num_bytes = _gpu.random_packed("int4", n, k, is_gated=is_gated).num_bytes
                return {
                    "op": "linear",
                    "shape": f"{name} {m} x {n} x {k}, int4 groups of 32 with zeros",
                    "is_tuned": bool(found),
                    "us": round(ours, 1),
                    "floor_us": round(num_bytes / bandwidth / 1e3, 1),
                    "cublas_bf16_us": round(cublas, 1),
                    "over_cublas": round(cublas / ours, 2),
                    **_marlin(n, k, m),
                }

            yield measure


def _marlin(n: int, k: int, m: int) -> dict[str, Any]:
    """vLLM's Marlin on a weight of the same shape (symmetric, groups of 128), where vLLM can be imported."""
    if util.find_spec("vllm") is None:
        return {}
    import torch
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_empty_g_idx,
        marlin_make_workspace_new,
    )
    from vllm.scalar_type import scalar_types

    device = torch.device("cuda")
    weight = torch.randint(-(1 << 31), (1 << 31) - 1, (k // 16, n * 2), dtype=torch.int32, device=device)
    scales = torch.rand(k // 128, n, dtype=torch.bfloat16, device=device)
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    empty, workspace = marlin_make_empty_g_idx(device), marlin_make_workspace_new(device)

    def run() -> None:
        apply_gptq_marlin_linear(
            x, weight, scales, empty, empty, empty, workspace, scalar_types.uint4b8, n, k, is_k_full=True
        )

    return {"vllm_marlin_us": round(_gpu.microseconds([run]), 1)}


def server(report: Reporter, seconds: float) -> None:
    """`headrace bench` against a server of its own on the triton back end, at few streams and at many."""
    environment = {**os.environ, "HEADRACE_BACKEND": "triton"}
    end = time.monotonic() + seconds
    for concurrency, requests in ((1, 8), (16, 64), (64, 256)):
        command = [sys.executable, "-m", "headrace.server.cli", "bench", "--json"]
        command += ["--concurrency", str(concurrency), "--requests", str(requests)]
        command += ["--prompt-tokens", "256", "--output-tokens", "128"]
        left = end - time.monotonic()
        if left < 20:
            report("server", concurrency=concurrency, status="out of time")
            return
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            report("server", concurrency=concurrency, status="out of time")
            return
        if done.returncode:
            report("server", concurrency=concurrency, status=done.returncode, stderr=done.stderr[-500:])
            continue
        report("server", concurrency=concurrency, result=json.loads(done.stdout.strip().splitlines()[-1]))


def steps(report: Reporter, seconds: float) -> None:
    """Decode steps of the default model, one in flight: what lies between the graphs is neither kernel nor need."""
    import torch
    from headrace.kernels.gpu.executor import GpuExecutor, GpuOptions
    from headrace.kernels.gpu.shape import StepLimits
    from headrace.models.load import load_model
    from headrace.models.sources import resolve
    from headrace.server.config import ServerConfig

    model = load_model(resolve(ServerConfig.model))
    limits = StepLimits(max_tokens=512, max_seqs=64, max_logit_rows=256, max_model_len=2048, block_size=64)
    executor = GpuExecutor(model.program, model.weights, limits, GpuOptions())
    executor.allocate_kv(64 * 32)
    executor.warm_up()
    for num_seqs in (1, 16, 64):
        known, pending = (decode_batch(num_seqs, is_pending=flag) for flag in (False, True))
        executor.execute(known)
        begin = time.perf_counter()
        executor.submit(pending)
        for _ in range(STEPS):
            executor.submit(pending)
            executor.collect()
        executor.collect()
        wall = (time.perf_counter() - begin) / (STEPS + 1) * 1e6
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(STEPS):
            executor.replay(num_seqs)
        events[1].record()
        events[1].synchronize()
        graph = events[0].elapsed_time(events[1]) / STEPS * 1e3
        gap = 1.0 - graph / wall
        report("steps", num_seqs=num_seqs, step_us=round(wall, 1), graph_us=round(graph, 1), gap=round(gap, 3))


def decode_batch(num_seqs: int, *, is_pending: bool, context: int = 1024, block_size: int = 64) -> StepBatch:
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


PHASES = (
    Phase("numerics", 140.0, numerics),
    Phase("tune", 100.0, tuning),
    Phase("times", 110.0, times),
    Phase("steps", 50.0, steps),
    Phase("server", 110.0, server),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[phase.name for phase in PHASES], help="default: all, in order")
    parser.add_argument("--save", action="store_true", help="append the lines to bench/results/gpu.jsonl")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    options = parser.parse_args()
    phases = [phase for phase in PHASES if options.only is None or phase.name in options.only]
    if options.dry_run:
        _print_plan(phases)
        return
    gpu = _gpu.gpu_line()
    if not gpu:
        raise SystemExit("no GPU: nothing here can be measured (--dry-run shows what would be)")
    report = Reporter(gpu)
    report("start", phases=[phase.name for phase in phases], peers=peers())
    begin = time.monotonic()
    for phase in phases:
        phase.run(report, phase.seconds)
    report("end", seconds=round(time.monotonic() - begin, 1))
    if options.save:
        with (Path(RESULTS) / "gpu.jsonl").open("a") as results:
            results.write("\n".join(report.lines) + "\n")


def peers() -> dict[str, bool]:
    """Which peers can be imported here."""
    return {name: _is_importable(module) for name, module in PEERS.items()}


def _is_importable(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ImportError:  # a parent is missing
        return False


def _print_plan(phases: list[Phase]) -> None:
    for phase in phases:
        print(json.dumps({"phase": phase.name, "seconds": phase.seconds, "what": (phase.run.__doc__ or "").strip()}))
    attention = [
        f"{case.num_seqs} x {case.context}, {case.query_len} rows, kv {case.kv}: {case.kv_bytes / 1e6:.1f} MB"
        for case in _gpu.attention_cases()
    ]
    products = [
        f"{m} x {n} x {k} ({name})" for m in PRODUCT_ROWS for name, n, k, _ in _gpu.MODELS["llama-3-8b"].products()[:4]
    ]
    plan = {"attention": attention, "products": products, "peers": peers(), "targets": TARGETS}
    print(json.dumps({"bench": "gpu", "dry_run": True, "seconds": sum(phase.seconds for phase in phases), **plan}))


if __name__ == "__main__":
    main()
