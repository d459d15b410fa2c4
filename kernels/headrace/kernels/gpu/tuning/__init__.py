"""Block sizes per GPU and shape: a pure lookup in the JSON tables beside this file. Nothing is ever tuned at run time.

`lookup` is called by the executor when it is made; what it does not know has the op's own default, which is valid on
every target. `bench/tune.py` writes a table on a GPU; the ahead-of-time gate compiles every entry of every table.

A row's sums must not depend on how many rows a step has, so parameters that change their order (ORDER, by op) must be
the same for every `m` of one shape: `load_table` refuses a table where they are not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
ORDER = {"linear": (), "paged_attention": ("block_n", "split")}


class TuningTableError(ValueError):
    """A table that must not be used; the message says which entry and why."""


@dataclass(frozen=True)
class Entry:
    """One tuned shape. m: most rows that it was tuned for; the smallest `m` that is enough is taken.

    key: the shape apart from m, e.g. (("group_size", 32), ("k", 4096), ("kind", "int4"), ("n", 4096)).
    """

    op: str
    key: tuple[tuple[str, int | str], ...]
    m: int
    config: Mapping[str, int]
    microseconds: float


@dataclass(frozen=True)
class Table:
    """Everything tuned on one GPU. entries: by op and key, m ascending."""

    gpu: str
    arch: str
    triton: str
    entries: Mapping[tuple[str, tuple[tuple[str, int | str], ...]], tuple[Entry, ...]]


def lookup(op: str, gpu: str, arch: str, *, m: int, **shape: int | str) -> dict[str, int]:
    """The tuned parameters for `op` at this shape and up to m rows; {} where nobody has tuned it.

    gpu: its name as the driver gives it; a table of another GPU of the same `arch` ("sm_90") is the second choice.
    """
    key = tuple(sorted(shape.items()))
    for table in _candidates(gpu, arch):
        entries = table.entries.get((op, key), ())
        for entry in entries:
            if m <= entry.m:
                return dict(entry.config)
        if entries:
            return dict(entries[-1].config)
    return {}


def _candidates(gpu: str, arch: str) -> Iterator[Table]:
    tables = load_tables()
    yield from (table for table in tables if table.gpu == gpu)
    yield from (table for table in tables if table.gpu != gpu and table.arch == arch)


@cache
def load_tables() -> tuple[Table, ...]:
    """All tables of this package."""
    return tuple(load_table(path) for path in sorted(FOLDER.glob("*.json")))


def load_table(path: Path) -> Table:
    """Read and check a table. Raises TuningTableError."""
    return parse_table(json.loads(path.read_text()), path.name)


def parse_table(data: Mapping[str, Any], name: str) -> Table:
    """As `load_table`; data as json.loads gives it."""
    grouped: dict[tuple[str, tuple[tuple[str, int | str], ...]], list[Entry]] = {}
    for number, item in enumerate(data["entries"]):
        shape, config = item.get("shape"), item.get("config")
        if not isinstance(shape, dict) or not isinstance(config, dict) or not isinstance(item.get("m"), int):
            raise TuningTableError(f"{name}: entry {number} needs a shape, m and a config")
        if not all(isinstance(value, int) for value in config.values()):
            raise TuningTableError(f"{name}: entry {number} has a parameter that is no integer")
        entry = Entry(item["op"], tuple(sorted(shape.items())), item["m"], config, float(item.get("microseconds", 0.0)))
        grouped.setdefault((entry.op, entry.key), []).append(entry)
    for (op, key), entries in grouped.items():
        if op not in ORDER:
            raise TuningTableError(f"{name}: there is no op {op} to tune")
        orders = {tuple(entry.config.get(parameter) for parameter in ORDER[op]) for entry in entries}
        if len(orders) > 1:
            raise TuningTableError(
                f"{name}: {op} {dict(key)} sums in different orders for different m ({', '.join(ORDER[op])} must agree)"
            )
    by_m = {key: tuple(sorted(entries, key=lambda entry: entry.m)) for key, entries in grouped.items()}
    return Table(str(data["gpu"]), str(data["arch"]), str(data["triton"]), by_m)


def table_name(gpu: str) -> str:
    """The file of a GPU: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"
