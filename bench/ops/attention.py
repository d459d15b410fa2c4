"""How fast native attention is, by instruction set: multiply-adds and bytes of KV per second. Ends in one JSON line.

Heads as in SmolLM2-135M unless said otherwise. "hot": one layer's KV read again and again from the caches; "cold": so
many streams that it comes from memory, as it does in a step over many layers. The quickest of all repeats, which take
turns: what the code can do, on a machine that others use too.

    python bench/ops/attention.py --isas avx2,avx512 --threads 1
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

import numpy as np
from headrace.kernels.native.library import info
from headrace.kernels.native.single_ops import (
    KV_KINDS,
    AttentionBatch,
    AttentionOptions,
    KvBlocks,
    KvKind,
    attention,
    rope_kv,
)


@dataclass(frozen=True)
class Case:
    """num_seqs sequences of num_tokens tokens, the last num_queries of which are computed."""

    name: str
    num_seqs: int
    num_tokens: int
    num_queries: int
    repeats: int


CASES = (
    Case("decode 1 hot, context 144", 1, 144, 1, 400),
    Case("decode 1 hot, context 256", 1, 256, 1, 400),
    Case("decode 1 hot, context 1024", 1, 1024, 1, 100),
    Case("decode 1 hot, context 8192", 1, 8192, 1, 20),
    Case("decode 32 hot, context 144", 32, 144, 1, 40),
    Case("decode 1024 cold, context 144", 1024, 144, 1, 3),
    Case("decode 512 cold, context 256", 512, 256, 1, 3),
    Case("prefill 256", 1, 256, 256, 10),
    Case("prefill 1024", 1, 1024, 1024, 3),
    Case("prefill 256 behind 1024", 1, 1280, 256, 5),
)


@dataclass(frozen=True)
class Shape:
    """Heads and blocks."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    kind: KvKind


@dataclass(frozen=True, eq=False)
class Setup:
    """A case, ready to run."""

    q: np.ndarray
    kv: KvBlocks
    batch: AttentionBatch
    num_macs: int
    num_bytes: int  # of K and V that somebody must read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--isas", default=",".join(info().usable))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--kind", choices=KV_KINDS, default="f16")
    parser.add_argument("--heads", default="9,3,64", help="query heads, KV heads, head_dim")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="instruction sets take turns so often")
    parser.add_argument("--only", default="", help="a part of the case's name")
    options = parser.parse_args()
    shape = Shape(*(int(n) for n in options.heads.split(",")), options.block_size, options.kind)
    results = []
    for case in CASES:
        if options.only not in case.name:
            continue
        setup = prepare(case, shape)
        seconds = measure(case, setup, shape, options)
        for isa, taken in seconds.items():
            gmacs, gigabytes = setup.num_macs / taken / 1e9, setup.num_bytes / taken / 1e9
            print(
                f"{case.name:30} {isa:11} {taken * 1e6:10.1f} us {gmacs:7.1f} GMAC/s {gigabytes:7.1f} GB/s", flush=True
            )
            results.append({"case": case.name, "isa": isa, "us": taken * 1e6, "gmacs": gmacs, "gbs": gigabytes})
    print(json.dumps({"bench": "ops_attention", "threads": options.threads, "kind": options.kind, "results": results}))


def prepare(case: Case, shape: Shape) -> Setup:
    """Random numbers in blocks in random order."""
    rng = np.random.default_rng(0)
    blocks_each = -(-case.num_tokens // shape.block_size)
    num_blocks = case.num_seqs * blocks_each
    tables = rng.permutation(num_blocks).astype(np.int32).reshape(case.num_seqs, blocks_each)
    kv = KvBlocks.empty(shape.kind, shape.num_kv_heads, shape.head_dim, shape.block_size, num_blocks)
    slots = num_blocks * shape.block_size
    for begin in range(0, slots, 4096):
        at = np.arange(begin, min(begin + 4096, slots))
        x = rng.standard_normal((len(at), shape.num_kv_heads * shape.head_dim), np.float32)
        rope_kv(x, x, x, at, kv)
    num_rows = case.num_seqs * case.num_queries
    q = rng.standard_normal((num_rows, shape.num_heads * shape.head_dim), np.float32)
    batch = AttentionBatch(
        np.arange(case.num_seqs + 1, dtype=np.int32) * case.num_queries,
        np.full(case.num_seqs, case.num_tokens, np.int32),
        tables,
    )
    keys = sum(range(case.num_tokens - case.num_queries + 1, case.num_tokens + 1))
    num_macs = case.num_seqs * keys * 2 * shape.num_heads * shape.head_dim
    num_bytes = case.num_seqs * case.num_tokens * kv.data.shape[1] // shape.block_size
    return Setup(q, kv, batch, num_macs, num_bytes)


def measure(case: Case, setup: Setup, shape: Shape, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of one op, by instruction set."""
    best: dict[str, float] = {}
    for _ in range(options.rounds):
        for isa in options.isas.split(","):
            repeats = max(1, case.repeats // 20) if isa == "generic" else case.repeats
            run = AttentionOptions(shape.head_dim**-0.5, num_threads=options.threads, repeats=repeats)
            result = attention(setup.q, setup.kv, setup.batch, run, isa=isa)
            best[isa] = min(best.get(isa, np.inf), float(result.nanoseconds.min()) / 1e9)
    return best


if __name__ == "__main__":
    main()
