"""`headrace.kernels.rewrite` for a GpuProgram. Used by the rewrites of `lower.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from headrace.kernels import rewrite
from headrace.kernels.gpu.ops import GpuOp, GpuProgram, reads, writes

Match = Callable[[Sequence[GpuOp], int], "tuple[Sequence[GpuOp], int] | None"]


def names_of(program: GpuProgram) -> rewrite.Names[GpuOp]:
    """Where the names of one program lie."""
    return rewrite.Names(program.buffers, program.views, program.ops, reads, writes, program.logits)


def replace_ops(program: GpuProgram, match: Match) -> GpuProgram:
    """`rewrite.replace_ops` over the program's ops."""
    return replace(program, ops=rewrite.replace_ops(program.ops, match))
