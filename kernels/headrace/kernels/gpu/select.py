"""A rewrite of its own: rows whose logits nobody wants leave before the last layer's MLP, not after it.

In a prefill step most rows are only there for their keys and values: the last layer's MLP need not see them. It costs
nothing: the gather of rows that stands before the output head moves up. Called by `lower.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from headrace.kernels.gpu.names import names_of
from headrace.kernels.gpu.ops import Attention, Embed, GpuOp, GpuProgram, Product, RopeKv, View, reads, writes
from headrace.kernels.program import Buffer, SelectRows
from headrace.kernels.rewrite import Names


def select_rows_early(program: GpuProgram) -> GpuProgram:
    """Move SelectRows up to the first place after the last attention where its input is all that is still needed."""
    names = names_of(program)
    at = next((i for i, op in enumerate(program.ops) if isinstance(op, SelectRows)), None)
    if at is None:
        return program
    select = program.ops[at]
    assert isinstance(select, SelectRows)
    begin = _earliest(program.ops, at, select.x, names)
    segment = program.ops[begin:at]
    if not segment or not names.is_dead(select.x, at + 1):
        return program
    renaming = _Renaming(program, select)
    moved = [renaming.op(op) for op in segment]
    ops = (*program.ops[:begin], select, *moved, *program.ops[at + 1 :])
    return replace(
        program,
        ops=ops,
        buffers=(*program.buffers, *renaming.buffers.values()),
        views=(*program.views, *renaming.views.values()),
    )


def _earliest(ops: Sequence[GpuOp], at: int, x: str, names: Names[GpuOp]) -> int:
    """The first index from which on, up to `at`, no row looks at another and only x is read that was there before."""
    best = at
    needed: list[str] = [x]
    for i in range(at - 1, -1, -1):
        op = ops[i]
        if isinstance(op, (Attention, RopeKv, Embed, SelectRows)) or (isinstance(op, Product) and op.rope_kv):
            break
        written = [names.columns(name) for name in writes(op)]
        needed = [name for name in needed if not any(w.holds(names.columns(name)) for w in written)]
        needed += [name for name in reads(op) if name not in needed]
        if needed == [x]:
            best = i
    return best


class _Renaming:
    """Gives the buffers that a moved segment uses a twin with rows of logits; select.x becomes select.out."""

    def __init__(self, program: GpuProgram, select: SelectRows) -> None:
        self._old_buffers = {buffer.name: buffer for buffer in program.buffers}
        self._old_views = {view.name: view for view in program.views}
        self._select = select
        self.buffers: dict[str, Buffer] = {}
        self.views: dict[str, View] = {}

    def name(self, name: str) -> str:
        if name == self._select.x:
            return self._select.out
        new = f"{name}.selected"
        view = self._old_views.get(name)
        if view is not None:
            self.views[new] = View(new, self.name(view.buffer), view.column, view.width)
        else:
            self.buffers[new] = Buffer(new, "logits", self._old_buffers[name].width)
        return new

    def op(self, op: GpuOp) -> GpuOp:
        """The op on the twins; only ops without a view of other rows come here (`_earliest`)."""
        fields = {
            field: getattr(op, field)
            for field in ("out", "x", "residual", "a", "b", "gate", "up")
            if hasattr(op, field)
        }
        renamed = {field: self.name(name) for field, name in fields.items() if name is not None}
        changed: GpuOp = replace(op, **renamed)  # type: ignore[arg-type]
        return changed
