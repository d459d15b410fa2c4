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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from headrace.kernels.gpu import tuning
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.paged_attention.config import AttentionConfig

ROWS = (16, 64, 256)
KINDS = ("int4", "int8", "dense")
CONTEXT = 4096  # positions of the sequences that attention is tuned on


@dataclass(frozen=True)
class Job:
    """One entry to be: an op at a shape, for up to m rows, and the configurations to try."""

    op: str
    shape: dict[str, int | str]
    m: int
    candidates: tuple[Any, ...]


def linear_candidates(m: int) -> Iterator[LinearConfig]:
    """Tiles that a product of m rows can use; few rows want many small programs that split K."""
    block_m = next(size for size in (16, 32, 64, 128) if size >= min(m, 128))
    few = ((32, 2, 3), (32, 2, 4), (32, 2, 5), (64, 2, 4), (64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3))
    many = ((64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 4))
    for block_n, num_warps, num_stages in few if m <= 32 else many:
        yield LinearConfig(block_m, block_n, num_warps, num_stages, split_programs=0 if m > 64 else 512)


def attention_candidates() -> Iterator[AttentionConfig]:
    """Warps and stages of both kernels, and the rows of a prefill tile."""
    for warps, stages in product((2, 4, 8), (2, 3, 5)):
        yield AttentionConfig(split_warps=warps, split_stages=stages)


def jobs(models: list[str], kinds: list[str], rows: list[int]) -> Iterator[Job]:
    """Everything to tune, the most used shapes first."""
    import _gpu

    for name in models:
        model = _gpu.MODELS[name]
        shape: dict[str, int | str] = {
            "head_dim": model.head_dim,
            "group": model.heads // model.kv_heads,
            "kv_dtype": "bf16",
            "block_size": 64,
        }
        yield Job("paged_attention", shape, 1, tuple(attention_candidates()))
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
                yield Job("linear", linear, m, tuple(linear_candidates(m)))


def measure(job: Job) -> dict[str, Any] | None:
    """The best candidate of a job as an entry of a table; None where none can run."""
    import _gpu

    best: tuple[float, Any] | None = None
    runs = _operands(job)
    for config in job.candidates:
        try:
            duration = _gpu.microseconds(runs(config), 32)
        except Exception as error:  # a launch that asks too much of this GPU is no candidate here
            print(json.dumps({"skipped": asdict(config), "op": job.op, "shape": job.shape, "why": str(error)[:200]}))
            continue
        if best is None or duration < best[0]:
            best = (duration, config)
    if best is None:
        return None
    default = asdict(type(best[1])())
    changed = {name: value for name, value in asdict(best[1]).items() if job.op == "linear" or value != default[name]}
    return {"op": job.op, "shape": job.shape, "m": job.m, "config": changed, "microseconds": round(best[0], 2)}


def _operands(job: Job) -> Callable[[Any], list[Callable[[], None]]]:
    """What a job runs on; from a configuration to launches."""
    import _gpu

    shape = job.shape
    if job.op == "linear":
        sizes = (int(shape["n"]), int(shape["k"]), job.m)
        return _gpu.product_runs(str(shape["kind"]), *sizes, is_gated=bool(shape["gated"]))
    groups = {(m.head_dim, m.heads // m.kv_heads): m for m in _gpu.MODELS.values()}
    model = groups[int(shape["head_dim"]), int(shape["group"])]
    return _gpu.attention_runs(_gpu.AttentionCase(model, 16, CONTEXT))


def tune(todo: list[Job], seconds: float) -> list[dict[str, Any]]:
    """Entries of as many jobs as fit into `seconds`; every one is printed as it is found."""
    entries = []
    end = time.monotonic() + seconds
    for number, job in enumerate(todo):
        if time.monotonic() > end:
            print(json.dumps({"tuned": number, "of": len(todo), "stopped": "out of time"}))
            break
        entry = measure(job)
        if entry is not None:
            entries.append(entry)
            print(json.dumps(entry), flush=True)
    return entries


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
    parser.add_argument("--models", nargs="+", choices=sorted(_gpu.MODELS), default=sorted(_gpu.MODELS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["int4"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="most rows of a step")
    parser.add_argument("--seconds", type=float, default=180.0, help="stop after this long; what was found is written")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured and stop")
    options = parser.parse_args()
    todo = list(jobs(options.models, options.kinds, options.rows))
    plan = {"jobs": len(todo), "configurations": sum(len(job.candidates) for job in todo), "seconds": options.seconds}
    if options.dry_run:
        for job in todo:
            print(json.dumps({"op": job.op, "shape": job.shape, "m": job.m, "candidates": len(job.candidates)}))
        print(json.dumps({"bench": "tune", "dry_run": True, **plan}))
        return
    gpu = _gpu.gpu_line()
    if not gpu:
        raise SystemExit("no GPU: nothing can be tuned here (--dry-run shows what would be)")
    print(json.dumps({"bench": "tune", **plan, **gpu}))
    path = write_table(tune(todo, options.seconds), gpu)
    print(json.dumps({"bench": "tune", "written": str(path.relative_to(tuning.FOLDER.parent)), **gpu}))


if __name__ == "__main__":
    main()
