"""The native executor alone: what a step costs, without scheduler, tokenizer or gRPC. Ends in one JSON line.

python bench/step.py                       decode at 1 .. 32 rows, prefill of 256 and 1024 tokens
python bench/step.py --profile --rows 1    where the time of a step goes, op by op
python bench/step.py --isa avx2,generic    instruction sets one after the other, interleaved round by round
python bench/step.py --hog                 each round again beside a busy process, and what that costs
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import finish, threads_of
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.native import library
from headrace.kernels.native.executor import KV_DTYPES, PROFILE_VARIABLE, NativeExecutor, pack
from headrace.kernels.native.fuse import fuse
from headrace.kernels.native.ops import form_of
from headrace.models.load import load_model
from headrace.server.cli.progress import fetch_model
from headrace.server.config import ServerConfig

BLOCK = 16
CHUNK = 512  # tokens of a prefill step, the server's default budget


@dataclass(frozen=True)
class Case:
    """rows: sequences that decode together at `context`; 0: one prompt of `context` tokens."""

    rows: int
    context: int

    @property
    def name(self) -> str:
        return f"decode {self.rows} rows, context {self.context}" if self.rows else f"prefill {self.context}"

    @property
    def tokens(self) -> int:
        """Tokens computed in one run of the case."""
        return self.rows or self.context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for headrace serve; default: the default model")
    parser.add_argument("--threads", type=int, default=0, help="0: as headrace doctor says")
    parser.add_argument("--isa", default="", help="instruction sets, comma-separated; default: the best")
    parser.add_argument("--rows", default="1,2,4,8,16,32", help="sequences that decode together")
    parser.add_argument("--contexts", default="144,256", help="of the decoding sequences")
    parser.add_argument("--prefill", default="256,1024", help="prompt lengths")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, default="fp16")
    parser.add_argument("--activation-bits", type=int, choices=(8, 16), default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="at least this long per case and round")
    parser.add_argument("--profile", action="store_true", help="measure every op (slows one row by some percent)")
    parser.add_argument("--hog", action="store_true", help="measure each round beside a busy loop too")
    parser.add_argument("--save", action="store_true", help="append the JSON line to bench/results/")
    options = parser.parse_args()
    if options.profile:
        os.environ[PROFILE_VARIABLE] = "1"
    cases = [Case(0, n) for n in _numbers(options.prefill)]
    cases += [Case(rows, context) for rows in _numbers(options.rows) for context in _numbers(options.contexts)]
    threads = threads_of(options)
    executors = _executors(options, cases, threads)
    results = []
    for case in cases:
        results += _measure(case, executors, options)
    result = {
        "model": options.model or ServerConfig.model,
        "threads": threads,
        "kv_dtype": options.kv_dtype,
        "activation_bits": options.activation_bits,
        "results": results,
    }
    finish("step", result, save=options.save)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _executors(options: argparse.Namespace, cases: list[Case], threads: int) -> list[NativeExecutor]:
    """One per instruction set, of the same packed weights."""
    model = load_model(fetch_model(options.model or ServerConfig.model))
    forms = {name: form_of(weight) for name, weight in model.weights.items() if len(weight.shape) == 2}
    native = fuse(model.program, forms, activation_bits=options.activation_bits)
    packed = pack(native, forms, model.weights)
    num_blocks = max(max(1, case.rows) * (case.context // BLOCK + 2) for case in cases)
    executors = []
    for isa in options.isa.split(","):
        if isa:
            os.environ[library.ISA_VARIABLE] = isa
        executors.append(
            NativeExecutor(
                model.program,
                packed,
                num_blocks=num_blocks,
                block_size=BLOCK,
                num_threads=threads,
                max_num_batched_tokens=CHUNK,
                kv_dtype=options.kv_dtype,
                activation_bits=options.activation_bits,
            )
        )
    return executors


def _measure(case: Case, executors: list[NativeExecutor], options: argparse.Namespace) -> list[dict[str, Any]]:
    batches = _prefill(case) if case.rows == 0 else [_decode(case)]
    times: dict[str, list[float]] = defaultdict(list)
    python: dict[str, list[float]] = defaultdict(list)
    for executor in executors:
        _fill(executor, case)
        _spent(executor)  # what filling took is no part of the profile
    ratios: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for executor in executors:
            alone = _run(executor, batches, options.seconds)
            times[executor.name] += alone
            if options.hog:
                with _hog():
                    beside = _run(executor, batches, options.seconds)
                ratios[executor.name].append(statistics.fmean(beside) / statistics.fmean(alone))
    for executor in executors:
        python[executor.name] = [_python_seconds(executor, batches[-1]) for _ in range(200)]
    results = []
    for executor in executors:
        best, median = min(times[executor.name]), statistics.median(times[executor.name])
        cost = statistics.median(python[executor.name])
        print(
            f"{executor.name:18} {case.name:30} {best * 1e3:8.2f} ms best {median * 1e3:8.2f} median "
            f"{case.tokens / best:7.0f} {case.tokens / median:7.0f} tok/s   python {cost * 1e6:4.0f} us"
        )
        if options.hog:
            print(f"    mean step beside a busy process: {statistics.median(ratios[executor.name]):.2f}x")
        if options.profile:
            _print_profile(executor)
        row = {"executor": executor.name, "case": case.name, "best_ms": round(best * 1e3, 3)}
        row |= {"median_ms": round(median * 1e3, 3), "tokens_per_second": round(case.tokens / median, 1)}
        row["beside_a_hog"] = round(statistics.median(ratios[executor.name]), 3) if options.hog else None
        results.append(row | {"runs": len(times[executor.name]), "python_us": round(cost * 1e6, 1)})
    return results


def _run(executor: NativeExecutor, batches: list[StepBatch], seconds: float) -> list[float]:
    """Seconds of each repetition, for at least that long."""
    times = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        before = time.perf_counter()
        for batch in batches:
            executor.execute(batch)
        times.append(time.perf_counter() - before)
    return times


@contextmanager
def _hog() -> Iterator[None]:
    """A process of our own priority that never waits."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            time.sleep(0.05)
            yield
        finally:
            process.kill()


def _prefill(case: Case) -> list[StepBatch]:
    tokens = _tokens(case.context)
    table = np.arange(case.context // BLOCK + 1, dtype=np.int32)
    return [
        _batch(tokens[i : i + CHUNK], [i], [min(CHUNK, case.context - i)], table[None])
        for i in range(0, case.context, CHUNK)
    ]


def _decode(case: Case) -> StepBatch:
    blocks = case.context // BLOCK + 2
    tables = np.random.default_rng(0).permutation(case.rows * blocks).astype(np.int32).reshape(case.rows, blocks)
    return _batch(_tokens(case.rows), [case.context] * case.rows, [1] * case.rows, tables)


def _tokens(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(100, 20_000, count).astype(np.int32)


def _batch(tokens: np.ndarray, starts: list[int], lengths: list[int], tables: np.ndarray) -> StepBatch:
    positions = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).astype(np.int32)
    sequences = np.repeat(np.arange(len(starts)), lengths)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    return StepBatch(
        token_ids=tokens,
        positions=positions,
        slot_mapping=(tables[sequences, positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
        cu_seqlens_q=offsets,
        seq_lens=np.array([s + n for s, n in zip(starts, lengths, strict=True)], np.int32),
        block_tables=np.ascontiguousarray(tables),
        logit_rows=offsets[1:] - np.int32(1),
        sampling=(RowSampling(),) * len(starts),
    )


def _fill(executor: NativeExecutor, case: Case) -> None:
    """Give the decoding sequences their context; a prefill warms itself up."""
    if case.rows == 0:
        for batch in _prefill(case):
            executor.execute(batch)
        return
    tables = _decode(case).block_tables
    for table in tables:
        for start in range(0, case.context, CHUNK):
            size = min(CHUNK, case.context - start)
            executor.execute(_batch(_tokens(size), [start], [size], table[None]))
    executor.execute(_decode(case))


def _python_seconds(executor: NativeExecutor, batch: StepBatch) -> float:
    """`execute` with the native call left out: what Python costs around it."""
    native, executor._library = executor._library, _Nothing()  # type: ignore[assignment]
    before = time.perf_counter()
    executor.execute(batch)
    seconds = time.perf_counter() - before
    executor._library = native
    return seconds


class _Nothing:
    """A library whose step does nothing."""

    def hr_executor_run(self, executor: object, batch: object) -> int:
        return 0


_reported: dict[str, dict[tuple[str, str], int]] = {}


def _spent(executor: NativeExecutor) -> dict[tuple[str, str], int]:
    """Nanoseconds since the last call, by kind of op and weight."""
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for op in executor.times():
        parts = [part.split(".", 2)[-1] if part.startswith("blk.") else part for part in op.name.split("+")]
        sums[op.kind, "+".join(parts)] += op.nanoseconds
    before = _reported.setdefault(executor.name, {})
    spent = {key: value - before.get(key, 0) for key, value in sums.items()}
    _reported[executor.name] = dict(sums)
    return spent


def _print_profile(executor: NativeExecutor) -> None:
    """Shares of the time since the case was filled, by kind of op and weight."""
    spent = _spent(executor)
    total = sum(spent.values())
    for (kind, name), value in sorted(spent.items(), key=lambda item: -item[1]):
        if value * 500 > total:
            print(f"    {100 * value / total:5.1f} %  {kind:10} {name}")


if __name__ == "__main__":
    main()
