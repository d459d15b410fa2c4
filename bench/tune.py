"""Tunes block sizes on this machine's GPU and writes them where the server looks them up. Never run at serving time.

    python bench/tune.py                                  all models, int4
    python bench/tune.py --models llama-3-8b --kinds int4 --rows 1 16
    python bench/tune.py --dry-run                        what would be measured; needs no GPU

Writes kernels/headrace/kernels/gpu/tuning/<gpu>.json; the ahead-of-time gate compiles every entry. A candidate changes
no row's bits: what does (columns per block and chunks of K of a product, tile and split of attention) is fixed by the
model and not tuned here. Has not run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from headrace.kernels.gpu import tuning
from headrace.kernels.linear.config import MANY_ROWS, WITH_TMA, LinearConfig

ROWS = (16, 64, 256)
KINDS = ("int4", "int8", "dense")
CONTEXT = 4096  # positions of the sequences that attention is tuned on


@dataclass(frozen=True)
class Job:
    """One entry to be: an op at a shape, for up to m rows. parts: changes of the default configuration to try; parts
    are of kernels that do not meet, so that each is tuned by itself: decode and prefill of attention."""

    op: str
    shape: dict[str, int | str]
    m: int
    parts: tuple[tuple[Mapping[str, int], ...], ...]

    @property
    def num_candidates(self) -> int:
        return sum(len(part) for part in self.parts)


def linear_candidates(m: int, *, has_tma: bool = False) -> Iterator[LinearConfig]:
    """Tiles that a product of m rows can use; few rows want many small programs that split K, many rows a program per
    SM. has_tma: many rows may come through tensor descriptors as well."""
    block_m = next(size for size in (16, 32, 64, 128) if size >= min(m, 128))
    few = ((32, 2, 3), (32, 2, 4), (32, 2, 5), (64, 2, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3))
    many = ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4))
    for block_n, num_warps, num_stages in few if m <= 32 else many:
        config = LinearConfig(block_m, block_n, num_warps, num_stages, split_programs=512)
        if m <= MANY_ROWS:
            yield config
            continue
        config = replace(config, split_programs=0, programs_per_sm=1)
        yield config
        if has_tma:
            yield replace(config, has_tma=True)


def attention_candidates() -> tuple[tuple[Mapping[str, int], ...], ...]:
    """Warps and stages of decode; rows of a tile, warps and stages of prefill."""
    decode = [{"split_warps": warps, "split_stages": stages} for warps, stages in product((2, 4, 8), (2, 3, 5))]
    prefill = [
        {"prefill_block_m": rows, "prefill_warps": warps, "prefill_stages": stages}
        for rows, warps, stages in ((128, 8, 2), (128, 8, 3), (128, 4, 2), (64, 4, 2), (64, 4, 3), (64, 8, 2))
    ]
    return tuple(decode), tuple(prefill)


def jobs(models: list[str], kinds: list[str], rows: list[int]) -> Iterator[Job]:
    """Everything to tune, the most used shapes first."""
    import _gpu

    for name in models:
        model = _gpu.MODELS[name]
        shape = _attention_shape(model)
        yield Job("paged_attention", shape, 1, attention_candidates())
        for kind, (_, n, k, is_gated) in product(kinds, model.products()):
            for m in rows:
                group = 0 if kind == "dense" else 32
                linear: dict[str, int | str] = {
                    "kind": kind,
                    "n": n,
                    "k": k,
                    "group_size": group,
                    "gated": int(is_gated),
                }
                has_tma = kind == "dense" and _gpu.gpu_line().get("arch") in WITH_TMA
                candidates = tuple(asdict(config) for config in linear_candidates(m, has_tma=has_tma))
                yield Job("linear", linear, m, (candidates,))


Runner = Callable[[Mapping[str, int]], list[Callable[[], None]]]  # from changes of the default to launches
Say = Callable[..., None]


def measure(job: Job, end: float, say: Say) -> dict[str, Any] | None:
    """The best candidates of a job as an entry of a table; None where none can run or time is over before half of a
    part was tried. end: of time.monotonic()."""
    import _gpu

    changed: dict[str, int] = {}
    durations = []
    for part, runner in zip(job.parts, _runners(job), strict=True):
        tried: list[tuple[float, Mapping[str, int]]] = []
        for number, candidate in enumerate(part):
            if time.monotonic() > end and number < len(part) // 2:
                return None
            try:
                tried.append((_gpu.microseconds(runner(candidate), 32), candidate))
            except Exception as error:  # a launch that asks too much of this GPU is no candidate here
                say(skipped=dict(candidate), op=job.op, shape=job.shape, why=f"{type(error).__name__}: {error}"[:200])
        if not tried:
            return None
        duration, best = min(tried, key=lambda pair: pair[0])
        durations.append(duration)
        changed |= best
    return {"op": job.op, "shape": job.shape, "m": job.m, "config": changed, "microseconds": round(durations[0], 2)}


def _runners(job: Job) -> list[Runner]:
    """What each part of a job runs on."""
    import _gpu

    shape = job.shape
    if job.op == "linear":
        sizes = (int(shape["n"]), int(shape["k"]), job.m)
        product_runs = _gpu.product_runs(str(shape["kind"]), *sizes, is_gated=bool(shape["gated"]))
        return [lambda candidate: product_runs(LinearConfig(**candidate))]
    model = _gpu.MODELS[next(name for name in _gpu.MODELS if _attention_shape(_gpu.MODELS[name]) == shape)]
    context = 80 if _gpu.is_rehearsal() else CONTEXT
    cases = (
        _gpu.AttentionCase(model, 2 if _gpu.is_rehearsal() else 16, context),
        _gpu.AttentionCase(model, 1, context, context),
    )

    def runner(case: Any) -> Runner:
        runs = _gpu.attention_runs(_gpu.attention_operands(case))
        default = _gpu.attention_config(case, is_tuned=False)
        return lambda candidate: runs(replace(default, **candidate))

    return [runner(case) for case in cases]


def _attention_shape(model: Any) -> dict[str, int | str]:
    return {"head_dim": model.head_dim, "group": model.heads // model.kv_heads, "kv_dtype": "bf16", "block_size": 64}


def tune(todo: list[Job], end: float, say: Say) -> Iterator[dict[str, Any]]:
    """Entries of as many jobs as fit until `end` of time.monotonic(), each as it is found."""
    for number, job in enumerate(todo):
        if time.monotonic() > end:
            say(tuned=number, of=len(todo), stopped="out of time")
            return
        try:
            entry = measure(job, end, say)
        except Exception as error:  # the next shape still counts
            say(failed=job.op, shape=job.shape, error=f"{type(error).__name__}: {error}"[:200])
            continue
        if entry is not None:
            yield entry


def write_table(entries: list[dict[str, Any]], gpu: dict[str, Any], folder: Path = tuning.FOLDER) -> Path:
    """Write a GPU's table, checked as the server will check it; entries of other shapes that it had stay."""
    path = folder / tuning.table_name(gpu["gpu"])
    kept = json.loads(path.read_text())["entries"] if path.exists() else []
    new = {_identity(entry) for entry in entries}
    table = {key: gpu[key] for key in ("gpu", "arch", "triton")}
    table["made_by"] = "bench/tune.py"
    table["entries"] = [entry for entry in kept if _identity(entry) not in new] + entries
    tuning.parse_table(table, path.name)
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def _identity(entry: dict[str, Any]) -> str:
    return json.dumps([entry["op"], sorted(entry["shape"].items()), entry["m"]])


def main() -> None:
    import _gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = sorted(_gpu.MODELS.keys() - {"tiny"})
    parser.add_argument("--models", nargs="+", choices=real, default=real)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int4"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="most rows of a step")
    parser.add_argument("--seconds", type=float, default=180.0, help="stop after this long; what was found is written")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured and stop")
    options = parser.parse_args()
    todo = list(jobs(options.models, options.kinds, options.rows))
    plan = {"jobs": len(todo), "configurations": sum(job.num_candidates for job in todo), "seconds": options.seconds}
    if options.dry_run:
        for job in todo:
            print(json.dumps({"op": job.op, "shape": job.shape, "m": job.m, "candidates": job.num_candidates}))
        print(json.dumps({"bench": "tune", "dry_run": True, **plan}))
        return
    gpu = _gpu.gpu_line()
    if not gpu:
        raise SystemExit("no GPU: nothing can be tuned here (--dry-run shows what would be)")

    def say(**values: Any) -> None:
        print(json.dumps({"bench": "tune", **values, **gpu}), flush=True)

    say(**plan)
    for entry in tune(todo, time.monotonic() + options.seconds, say):
        say(entry=entry, written=write_table([entry], gpu).name)


if __name__ == "__main__":
    main()
