"""Every entry of every tuning table (headrace.kernels.gpu.tuning), on the GPU that it was tuned on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from headrace.kernels.gpu.tuning import Entry, Table, load_tables
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.paged_attention import AttentionConfig

from tests.gpu.aot.cases import Case
from tests.gpu.aot.cases_attention import attend
from tests.gpu.aot.cases_linear import Matrix, multiply
from tests.gpu.aot.targets import Target


def cases() -> Iterator[Case]:
    for table in load_tables():
        for entries in table.entries.values():
            for entry in entries:
                yield _case(table, entry)


def _case(table: Table, entry: Entry) -> Case:
    key = dict(entry.key)
    name = f"tuned/{table.gpu}/{entry.op}/{'-'.join(str(value) for value in key.values())}/{entry.m}"

    def runs_on(target: Target) -> bool:
        return target.name == f"cuda:{table.arch.removeprefix('sm_')}"

    if entry.op == "linear":
        return Case(name, partial(_multiply, key=key, entry=entry), "float", runs_on, is_quick=False)
    if entry.op == "paged_attention":
        return Case(name, partial(_attend, key=key, entry=entry), "float", runs_on)
    raise ValueError(f"{name}: no case is made for tuned entries of {entry.op!r}; add one here")


def _multiply(target: Target, *, key: Mapping[str, int | str], entry: Entry) -> None:
    """Plain, with a residual, and gated where the entry is: what a layer asks of the shape."""
    kind, group = str(key["kind"]), int(key["group_size"])
    shape = {"n": int(key["n"]), "k": int(key["k"]), "is_gated": bool(key["gated"])}
    matrix = Matrix("tuned", **shape, has_norm=True, has_residual=not key["gated"])
    name = f"{kind}-g{group}" if group else kind
    multiply(target, matrix=matrix, kind=name, rows=entry.m, config=LinearConfig(**entry.config))


def _attend(target: Target, *, key: Mapping[str, int | str], entry: Entry) -> None:
    config = AttentionConfig(**entry.config)
    shape = {"heads": int(key["group"]) * 8, "kv_heads": 8, "head_dim": int(key["head_dim"])}
    for seqs, rows in ((16, 1), (2, 1024)):
        attend(target, **shape, num_seqs=seqs, query_len=rows, kv=str(key["kv_dtype"]), config=config)
