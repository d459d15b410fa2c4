"""The table of compiled kernels, as text. Called by __main__.py and, for docs/KERNELS.md, by document.py."""

from __future__ import annotations

from collections.abc import Sequence

from tests.gpu.aot.gate import CaseRow

_HEAD = ("case and kernel", "target", "warps", "regs", "spill", "shared", "CTA/SM", "matrix", "loads", "loop", "wide")


def table(rows: Sequence[CaseRow]) -> str:
    """One line per kernel and target."""
    lines = [_HEAD, *(cells(item) for item in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def cells(item: CaseRow) -> tuple[str, ...]:
    row = item.row
    if row.error:
        return (item.key, row.target, *("",) * 8, row.error)
    matrix = " ".join(f"{name}x{count}" for name, count in sorted(row.matrix.items())) or "-"
    loads = " ".join(f"{width}Bx{count}" for width, count in sorted(row.loads.items(), reverse=True))
    loads = " ".join(part for part in (loads, f"TMAx{row.bulk}" if row.bulk else "") if part)
    return (
        item.key,
        row.target,
        str(row.warps),
        str(row.registers),
        str(row.spills),
        f"{row.shared / 1024:.1f}K",
        f"{row.ctas} {row.limit}",
        matrix,
        loads or "-",
        str(row.loop),
        f"{row.wide_share:.0%}",
    )
