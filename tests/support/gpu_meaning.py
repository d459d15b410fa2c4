"""What each op of a GpuProgram means, in ops of the step program: the lowering's tests run the expansion on the torch
executor and compare logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from headrace.kernels.gpu import ops as gpu
from headrace.kernels.gpu.names import names_of
from headrace.kernels.program import (
    Add,
    Buffer,
    Embed,
    GatedActivation,
    KvWrite,
    Linear,
    Op,
    PagedAttention,
    RmsNorm,
    Rope,
    StepProgram,
)


def expand(program: gpu.GpuProgram, original: StepProgram) -> StepProgram:
    """The program in reference ops. Views become buffers of their own, so a name that is read but was never written as
    that name fails; what an epilogue leaves undefined is not computed, so reading it fails too. Rows in 8 bits are the
    rows themselves; reading them once these have changed fails."""
    buffers = {buffer.name: buffer for buffer in program.buffers}
    for view in program.views:
        buffers[view.name] = Buffer(view.name, buffers[view.buffer].rows, view.width)
    ops: list[Op] = []
    names, held = names_of(program), dict[str, str]()
    for number, op in enumerate(program.ops):
        if isinstance(op, gpu.QuantizeRows):
            held[op.out] = op.x
            continue
        if isinstance(op, gpu.Product):
            op = replace(op, x=held.get(op.x, op.x))
        ops += _expand_op(op, number, program, original)
        held = {out: x for out, x in held.items() if not any(names.overlap(x, name) for name in gpu.writes(op))}
    return StepProgram(
        tuple(buffers.values()), tuple(ops), original.weights, program.kv, program.vocab_size, program.logits
    )


def _expand_op(op: gpu.GpuOp, number: int, program: gpu.GpuProgram, original: StepProgram) -> Iterator[Op]:
    if isinstance(op, gpu.Embed):
        yield Embed(op.out, _sources(program, op.table)[0], op.scale)
    elif isinstance(op, gpu.Norm):
        yield RmsNorm(op.out, op.x, op.weight, op.eps, op.group)
    elif isinstance(op, gpu.RopeKv):
        yield from _rope(op)
    elif isinstance(op, gpu.Attention):
        shape = (op.num_heads, op.num_kv_heads, op.head_dim)
        yield PagedAttention(op.out, op.q, op.layer, *shape, op.scale, op.window, op.soft_cap)
    elif isinstance(op, gpu.QuantizeGated):
        yield GatedActivation(op.out, op.gate, op.up, op.kind)
    elif isinstance(op, gpu.Product):
        yield from _product(op, number, program, original)
    else:
        yield op


def _product(op: gpu.Product, number: int, program: gpu.GpuProgram, original: StepProgram) -> Iterator[Op]:
    x = op.x
    sources = _sources(program, op.matrix)
    heights = {spec.name: spec.shape[0] for spec in original.weights}
    if op.norm is not None:
        width = next(spec.shape[0] for spec in original.weights if spec.name == op.norm.weight)
        x = f"normed.{number}"
        yield RmsNorm(x, op.x, op.norm.weight, op.norm.eps, width)
    if op.activation is not None:
        gate, up = (f"{name}.{number}" for name in ("gate", "up"))
        yield Linear(gate, x, sources[0])
        yield Linear(up, x, sources[1])
        yield GatedActivation(op.out, gate, up, op.activation)
        return
    outs = [op.out] if len(sources) == 1 else _parts(program, op.out, [heights[name] for name in sources])
    biases = op.bias or (None,) * len(sources)
    for out, source, bias in zip(outs, sources, biases, strict=True):
        target = out if op.residual is None else f"product.{number}"
        yield Linear(target, x, source, bias)
        if op.residual is not None:
            yield Add(op.out, op.residual, target)
    if op.next_norm is not None:
        width = next(buffer.width for buffer in program.buffers if buffer.name == op.out)
        yield RmsNorm(op.next_norm.normed, op.out, op.next_norm.weight, op.next_norm.eps, width)
    if op.rope_kv is not None:
        yield from _rope(op.rope_kv)


def _rope(op: gpu.RopeKv) -> Iterator[Op]:
    for name, norm in ((op.q, op.q_norm), (op.k, op.k_norm)):
        if name is not None and norm is not None:
            yield RmsNorm(name, name, norm, op.eps, op.head_dim)
        if name is not None and op.inv_freq:
            yield Rope(name, op.head_dim, op.inv_freq, op.attention_factor)
    if op.k is not None and op.v is not None:
        yield KvWrite(op.layer, op.k, op.v)


def _sources(program: gpu.GpuProgram, matrix: str) -> tuple[str, ...]:
    return next(spec.sources for spec in program.matrices if spec.name == matrix)


def _parts(program: gpu.GpuProgram, out: str, widths: list[int]) -> list[str]:
    """The names of the columns that a joined product writes, source by source."""
    whole = next((v for v in program.views if v.name == out), gpu.View(out, out, 0, sum(widths)))
    names, column = [], whole.column
    for width in widths:
        names.append(
            next(v.name for v in program.views if (v.buffer, v.column, v.width) == (whole.buffer, column, width))
        )
        column += width
    return names
