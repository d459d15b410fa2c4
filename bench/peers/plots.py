"""Plots as SVG, written by hand so that the bench needs no plotting library. Called by `main.py`, `curves.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_LEFT, _RIGHT, _TOP, _LINE = 250, 800, 52, 24
_LOW, _HIGH = 0.125, 16.0
_COLOURS = {"aim": "#1a7f37", "reached": "#54a0d6", "MISSED": "#d1495b", "absent": "#b0b0b0"}
_SERIES = ("#1a7f37", "#d1495b", "#54a0d6", "#8a63d2")


def bars(lines: Sequence[Mapping[str, Any]], title: str) -> str:
    """The table's rows on a logarithmic axis. Right is better: where lower is better, the bar is theirs / ours. A tick
    marks what the row must reach at least, a circle its aim."""
    bottom = _TOP + _LINE * len(lines)
    parts = [*_page(1000, bottom + 44, title)]
    for tick in (0.125, 0.25, 0.5, 1, 2, 4, 8, 16):
        x = _x(tick)
        parts.append(_rule(x, _TOP - 8, x, bottom, "#444444" if tick == 1 else "#dddddd"))
        parts.append(_text(x, bottom + 16, f"{tick:g}x", "middle"))
    for number, line in enumerate(lines):
        parts += _bar(line, _TOP + _LINE * number)
    legend = (
        "right of 1x: better than the peer; tick: at least; circle: aim; green: aim met, blue: reached, red: missed"
    )
    return "\n".join([*parts, _text(20, bottom + 36, legend), "</svg>", ""])


def _bar(line: Mapping[str, Any], y: int) -> list[str]:
    name = _text(_LEFT - 8, y + 14, line["name"], "end")
    if line["ratio"] is None:
        return [name, _text(_x(1) + 4, y + 14, "absent")]
    turned = [1 / v if line["lower_is_better"] else v for v in (line["ratio"], line["target"], line["aim"])]
    start, (end, least, aim) = _x(1), [_x(value) for value in turned]
    rectangle = f'x="{min(start, end):.1f}" y="{y + 3}" width="{abs(end - start):.1f}" height="14"'
    return [
        name,
        f'<rect {rectangle} fill="{_COLOURS[line["verdict"]]}"/>',
        f'<line x1="{least:.1f}" y1="{y}" x2="{least:.1f}" y2="{y + 20}" stroke="#000000" stroke-width="2"/>',
        f'<circle cx="{aim:.1f}" cy="{y + 10}" r="3.5" fill="none" stroke="#000000"/>',
        _text(max(start, end, aim, least) + 8, y + 14, f"{line['ratio']:.2f}x {line['peer']}"),
    ]


def _x(ratio: float) -> float:
    share = math.log(min(max(ratio, _LOW), _HIGH) / _LOW) / math.log(_HIGH / _LOW)
    return _LEFT + share * (_RIGHT - _LEFT)


def curve(series: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str, y_name: str) -> str:
    """Lines through points, both axes logarithmic to base 2; every x is ticked."""
    points = [point for line in series.values() for point in line]
    parts = [*_page(760, 420, title)]
    if not points:
        return "\n".join([*parts, _text(300, 200, "no points"), "</svg>", ""])
    xs = sorted({x for x, _ in points})
    low = 2 ** math.floor(math.log2(min(y for _, y in points)))
    high = max(2 * low, 2 ** math.ceil(math.log2(max(y for _, y in points))))

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log2(x / xs[0]) / max(1e-9, math.log2(xs[-1] / xs[0]))
        return 70 + across * 560, 360 - math.log2(y / low) / math.log2(high / low) * 310

    for x in xs:
        left, _ = place(x, low)
        parts += [_rule(left, 50, left, 360, "#eeeeee"), _text(left, 376, f"{x:g}", "middle")]
    y = low
    while y <= high:
        _, top = place(xs[0], y)
        parts += [_rule(70, top, 630, top, "#dddddd"), _text(64, top + 4, f"{y:g}", "end")]
        y *= 2
    for colour, (name, line) in zip(_SERIES, series.items(), strict=False):
        placed = [place(x, y) for x, y in line]
        path = " ".join(f"{left:.1f},{top:.1f}" for left, top in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3" fill="{colour}"/>' for left, top in placed]
        if placed:
            parts.append(
                f'<text x="638" y="{placed[-1][1] + 4:.1f}" font-size="12" fill="{colour}">{escape(name)}</text>'
            )
    return "\n".join([*parts, _text(350, 402, x_name, "middle"), _text(20, 40, y_name), "</svg>", ""])


def _page(width: int, height: int, title: str) -> list[str]:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">'
    return [head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', _text(20, 24, title, size=15)]


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="#222222">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
