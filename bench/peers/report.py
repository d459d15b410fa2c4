"""Outcomes as JSON lines and as a table (stdout, and docs/PERFORMANCE.md between markers). Called by `main.py`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench.peers.process import without_paths
from bench.peers.rows import Outcome

_HEADER = ("work", "ours", "theirs", "ratio", "at least", "aim", "verdict", "name")


def to_json(outcome: Outcome, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The row's line in bench/results. `facts` is what all rows of a run have in common: isa, versions, commit ..."""
    row = outcome.row
    return {
        "name": row.name,
        "ratio": _rounded(outcome.ratio),
        "ours": _rounded(outcome.ours),
        "theirs": _rounded(outcome.theirs),
        "peer": outcome.peer,
        "unit": row.unit,
        "lower_is_better": row.lower_is_better,
        "target": row.at_least,
        "aim": row.aim,
        "verdict": outcome.verdict,
        "rounds": len(outcome.ratios),
        "ratios": [_rounded(ratio) for ratio in outcome.ratios],
        "ratio_by_peer": {peer: _rounded(ratio) for peer, ratio in outcome.peers.items()},
        "absent": {peer: without_paths(why) for peer, why in outcome.absent.items()},
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
    }


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]], key: Sequence[str] = ("name", "isa")) -> None:
    """Puts the lines into a .jsonl file in place of those with the same key; what was not measured now stays."""
    kept: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    old = path.read_text().splitlines() if path.exists() else []
    for line in [*map(json.loads, old), *lines]:
        kept[tuple(line.get(part) for part in key)] = line
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept.values()))


def read_lines(path: Path, isa: str) -> list[dict[str, Any]]:
    """The lines of one instruction set in a .jsonl file."""
    return [line for line in map(json.loads, path.read_text().splitlines()) if line["isa"] == isa]


def table(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows as a Markdown table, one string a line."""
    cells = [_HEADER, *(_cells(line) for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADER))]
    texts = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]]


def reasons(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence per peer that is absent from a row, for below the table."""
    seen: dict[str, list[str]] = {}
    for line in lines:
        for peer, why in line["absent"].items():
            seen.setdefault(f"{peer}: {why}", []).append(line["name"])
    return [f"ABSENT {sentence} ({', '.join(names)})" for sentence, names in seen.items()]


def replace_between(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with what stands between the markers of `name` replaced. Raises ValueError unless both are there once."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{begin} and {end} must each stand in the text once, in this order")
    head, rest = text.split(begin)
    _, tail = rest.split(end)
    return head + begin + "\n" + "\n".join(lines) + "\n" + end + tail


def _cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    sign = "≤ " if line["lower_is_better"] else "≥ "
    if line["ratio"] is None:
        return (
            line["name"],
            "–",
            "–",
            "–",
            sign + f"{line['target']:g}",
            sign + f"{line['aim']:g}",
            "absent",
            line["name"],
        )
    return (
        _work(line),
        f"{_figure(line['ours'])} {line['unit']}",
        f"{_figure(line['theirs'])} ({line['peer']})",
        f"**{line['ratio']:.2f}**",
        sign + f"{line['target']:g}",
        sign + f"{line['aim']:g}",
        line["verdict"],
        line["name"],
    )


def _work(line: Mapping[str, Any]) -> str:
    return str(line.get("work", line["name"]))


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
