"""The rows whose logits nobody wants leave the step after the last layer's attention instead of before the output head.

What follows the last attention is row by row: output projection, norms, MLP. A prompt's chunk wants one row of logits,
or none, so that a layer's largest products run for one row instead of hundreds (2.5 % of a prefill with 30 layers).
Called by `fuse.py` before anything is lowered; every row that is left is computed as it was, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from headrace.kernels.program import (
    Add,
    Buffer,
    GatedActivation,
    Linear,
    Op,
    PagedAttention,
    RmsNorm,
    SelectRows,
    SoftCap,
    StepProgram,
)

# Ops that make row i of `out` of row i of what they read, and the names of their fields that are buffers read.
_INPUTS: dict[type[Op], tuple[str, ...]] = {
    RmsNorm: ("x",),
    Linear: ("x",),
    Add: ("a", "b"),
    GatedActivation: ("gate", "up"),
}


def select_rows_early(program: StepProgram) -> StepProgram:
    """SelectRows right behind the last attention, of each buffer that the ops between the two read.

    A program that is not of that form is returned as it is.
    """
    ops = program.ops
    selections = [i for i, op in enumerate(ops) if isinstance(op, SelectRows)]
    attentions = [i for i, op in enumerate(ops) if isinstance(op, PagedAttention)]
    if len(selections) != 1 or not attentions:
        return program
    begin, end = attentions[-1] + 1, selections[0]
    selection, section, rest = ops[end], ops[begin:end], ops[end + 1 :]
    if not isinstance(selection, SelectRows) or not all(type(op) in _INPUTS for op in section):
        return program
    buffers = {buffer.name: buffer for buffer in program.buffers}
    written = {_out(op) for op in section}
    if selection.x not in written or any(buffers[name].rows != "logits" for op in rest for name in _names(op)):
        return program
    entering: list[str] = []  # read before the section writes them
    known: set[str] = set()
    for op in section:
        entering += [name for name in _reads(op) if name not in known and name not in entering]
        known.add(_out(op))
    chosen = {name: f"{name}.chosen" for name in sorted(written | set(entering))}
    added = [Buffer(new, "logits", buffers[name].width) for name, new in chosen.items()]
    names = {**chosen, selection.out: chosen[selection.x]}
    moved = [SelectRows(chosen[name], name) for name in entering]
    kept = [buffer for buffer in program.buffers if buffer.name != selection.out]
    return replace(
        program,
        buffers=(*kept, *added),
        ops=(*ops[:begin], *moved, *_renamed(section, chosen), *_renamed(rest, names)),
    )


def _out(op: Op) -> str:
    return op.x if isinstance(op, SoftCap) else str(getattr(op, "out", ""))


def _reads(op: Op) -> list[str]:
    return [getattr(op, field) for field in _INPUTS.get(type(op), ("x",))]


def _names(op: Op) -> list[str]:
    return [*_reads(op), _out(op)]


def _renamed(ops: Sequence[Op], names: Mapping[str, str]) -> list[Op]:
    """The ops with other buffers in the place of those in `names`."""
    result: list[Op] = []
    for op in ops:
        fields = (*_INPUTS.get(type(op), ("x",)), *(("out",) if hasattr(op, "out") else ()))
        result.append(replace(op, **{field: names.get(getattr(op, field), getattr(op, field)) for field in fields}))
    return result
