"""A rewrite of its own: a product that adds to the residual prepares the norm that comes next, and the products that
read it finish it. No launch, and no prologue that every program repeats: as many launches a layer for 256 decode rows
as for one. Called by `lower.py`; `headrace.kernels.linear.triton_next_norm` has the arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

from headrace.kernels.gpu.names import names_of
from headrace.kernels.gpu.ops import GpuOp, GpuProgram, NextNorm, Product, TypedBuffer, writes
from headrace.kernels.program import Buffer

SQUARES_COLUMNS = 32  # `headrace.kernels.linear.layout`, which this module must not need


def prepare_norms(program: GpuProgram) -> GpuProgram:
    """Where a product's norm is of what another product has just added up, and of nothing else since."""
    names = names_of(program)
    rows = {buffer.name: buffer.rows for buffer in program.buffers}
    buffers = {buffer.name: buffer for buffer in program.buffers}
    ops: list[GpuOp] = list(program.ops)
    for index, first in enumerate(ops):
        if not isinstance(first, Product) or first.residual != first.out or first.out not in rows:
            continue
        readers = _readers(ops, index, first.out)
        if not readers:
            continue
        norm = ops[readers[0]].norm  # type: ignore[union-attr]
        assert norm is not None
        normed, squares = f"{first.out}.normed", f"{first.out}.squares"
        width = names.width(first.out)
        buffers[normed] = Buffer(normed, rows[first.out], width)
        buffers[squares] = TypedBuffer(squares, rows[first.out], -(-width // SQUARES_COLUMNS), "fp32")
        ops[index] = replace(first, next_norm=NextNorm(normed, squares, norm.weight, norm.eps))
        for reader in readers:
            second = ops[reader]
            assert isinstance(second, Product)
            if second.norm == norm:
                ops[reader] = replace(second, x=normed, norm=None, squares=squares, eps=norm.eps)
    return replace(program, ops=tuple(ops), buffers=tuple(buffers.values()))


def _readers(ops: list[GpuOp], index: int, name: str) -> list[int]:
    """The products that norm what op `index` left in `name`, before it changes."""
    found = []
    for later in range(index + 1, len(ops)):
        op = ops[later]
        if isinstance(op, Product) and op.x == name and op.norm is not None:
            found.append(later)
        if name in writes(op):
            break
    return found
