"""From a step program to the one that the GPU runs: packed weights, fused ops, six launches a layer in decode.

`translate` goes op by op; each rewrite after it replaces a pattern of neighbouring ops by one op of the same meaning
(tests/kernels/test_gpu_lower.py runs the program after each of them). What matches no pattern stays as it is. Called by
`executor.py`. The one list serves prefill and decode alike: which kernel computes a row must not depend on how many
rows a step has, or a row's bits would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.kernels.gpu.names import names_of, replace_ops
from headrace.kernels.gpu.next_norm import prepare_norms
from headrace.kernels.gpu.ops import (
    Attention,
    Embed,
    GpuOp,
    GpuProgram,
    Norm,
    NormPrologue,
    PackSpec,
    Product,
    RopeKv,
    View,
    WeightForm,
    reads,
    writes,
)
from headrace.kernels.gpu.quantization import BLOCK, quantize_inputs
from headrace.kernels.gpu.select import select_rows_early
from headrace.kernels.program import (
    Add,
    Buffer,
    GatedActivation,
    KvWrite,
    Linear,
    Op,
    PagedAttention,
    RmsNorm,
    Rope,
    StepProgram,
)
from headrace.kernels.program import Embed as ProgramEmbed


@dataclass(frozen=True)
class LowerOptions:
    """Which fusions are made. has_norm_prologue: norms inside the products that read them. has_next_norm: or, where
    that can be, begun by the product before and ended by the one that reads them. has_rope_epilogue: rotary embedding
    and KV write inside the product of q, k and v (power-of-two head_dim only)."""

    has_norm_prologue: bool = True
    has_next_norm: bool = True
    has_rope_epilogue: bool = True


EPILOGUE_HEAD_DIMS = (16, 32, 64, 128, 256)  # a head is a power of two of columns of a tile

Forms = Mapping[str, WeightForm]
Rewrite = Callable[[GpuProgram, Forms, LowerOptions], GpuProgram]


def lower(program: StepProgram, forms: Forms, options: LowerOptions | None = None) -> GpuProgram:
    """The program as the GPU runs it best. forms: of every matrix of the program (`ops.form_of`)."""
    gpu = translate(program)
    for rewrite in REWRITES:
        gpu = rewrite(gpu, forms, options or LowerOptions())
    return gpu


def translate(program: StepProgram) -> GpuProgram:
    """Op by op, nothing fused."""
    matrices = {spec.name for spec in program.weights if len(spec.shape) == 2}
    return GpuProgram(
        buffers=program.buffers,
        views=(),
        ops=tuple(_translate_op(op, program) for op in program.ops),
        matrices=tuple(PackSpec(spec.name, (spec.name,)) for spec in program.weights if spec.name in matrices),
        vectors=tuple(spec for spec in program.weights if spec.name not in matrices),
        kv=program.kv,
        vocab_size=program.vocab_size,
        logits=program.logits,
    )


def _translate_op(op: Op, program: StepProgram) -> GpuOp:
    if isinstance(op, ProgramEmbed):
        return Embed(op.out, op.table, op.scale)
    if isinstance(op, Linear):
        return Product(op.out, op.x, op.weight, bias=() if op.bias is None else (op.bias,))
    if isinstance(op, RmsNorm):
        return Norm(op.out, op.x, op.weight, op.eps, op.group)
    if isinstance(op, Rope):
        return RopeKv(op.x, None, None, -1, op.head_dim, op.inv_freq, op.attention_factor)
    if isinstance(op, KvWrite):
        return RopeKv(None, op.k, op.v, op.layer, program.kv[op.layer].head_dim)
    if isinstance(op, PagedAttention):
        shape = (op.num_heads, op.num_kv_heads, op.head_dim)
        return Attention(op.out, op.q, op.layer, *shape, op.scale, op.window, op.soft_cap)
    return op


def fuse_gates(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """Products for gate and up, then GatedActivation: one product with a gated matrix."""
    names = names_of(program)
    specs = {spec.name: spec for spec in program.matrices}

    def match(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        if i + 3 > len(ops):
            return None
        gate, up, act = ops[i : i + 3]
        if not (isinstance(gate, Product) and isinstance(up, Product) and isinstance(act, GatedActivation)):
            return None
        fits = (act.gate, act.up) == (gate.out, up.out) and gate.out != up.out and gate.x == up.x
        if not fits or gate.bias or up.bias or forms[gate.matrix] != forms[up.matrix]:
            return None
        if names.overlap(act.out, gate.x) or not all(names.is_dead(name, i + 3) for name in (act.gate, act.up)):
            return None
        spec = PackSpec(f"{gate.matrix}+{up.matrix}", (gate.matrix, up.matrix), is_gated=True)
        specs[spec.name] = spec
        return [Product(act.out, gate.x, spec.name, activation=act.kind)], 3

    program = replace_ops(program, match)
    return replace(program, matrices=tuple(specs.values()))


def merge_products(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """Neighbouring products of one input become one with the rows of all; their outputs become columns of one buffer.

    The columns are laid out alike for the whole program; products whose weights differ in form write their own part.
    """
    program = _lay_out(program)
    views = {view.name: view for view in program.views}
    specs = {spec.name: spec for spec in program.matrices}

    def match(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        run = _run(ops, i)
        if not run or run[0].out not in views:
            return None
        first = views[run[0].out]
        end, taken = first.column, []
        for op in run:
            view = views.get(op.out)
            same = forms[op.matrix] == forms[run[0].matrix] and bool(op.bias) == bool(run[0].bias)
            if forms[op.matrix].kind == "fp8_block" and (end - first.column) % BLOCK:
                break  # no block may span two matrices
            if view is None or (view.buffer, view.column) != (first.buffer, end) or not same:
                break
            end += view.width
            taken.append(op)
        if len(taken) < 2:
            return None
        spec = PackSpec("+".join(op.matrix for op in taken), tuple(op.matrix for op in taken))
        out = "+".join(op.out for op in taken)
        specs[spec.name] = spec
        if out != first.buffer:
            views[out] = View(out, first.buffer, first.column, end - first.column)
        return [Product(out, run[0].x, spec.name, bias=tuple(b for op in taken for b in op.bias))], len(taken)

    program = replace_ops(program, match)
    return replace(program, views=tuple(views.values()), matrices=tuple(specs.values()))


def _run(ops: Sequence[GpuOp], i: int) -> list[Product]:
    """The plain products of one input that follow each other from op i on, each to a buffer of its own."""
    run: list[Product] = []
    for op in ops[i:]:
        if not isinstance(op, Product) or op.activation or op.residual or op.x == op.out:
            break
        if run and (op.x != run[0].x or op.out in [other.out for other in run]):
            break
        run.append(op)
    return run


def _lay_out(program: GpuProgram) -> GpuProgram:
    """Give the outputs of each run of products one buffer, side by side."""
    buffers = {buffer.name: buffer for buffer in program.buffers}
    views = {view.name: view for view in program.views}
    i = 0
    while i < len(program.ops):
        run = _run(program.ops, i)
        outs = [op.out for op in run]
        i += max(1, len(run))
        if len(outs) < 2 or program.logits in outs or any(name not in buffers for name in outs):
            continue
        parts = [buffers[name] for name in outs]
        merged = Buffer("+".join(outs), parts[0].rows, sum(part.width for part in parts))
        column = 0
        for part in parts:
            views[part.name] = View(part.name, merged.name, column, part.width)
            column += part.width
            del buffers[part.name]
        buffers[merged.name] = merged
    return replace(program, buffers=tuple(buffers.values()), views=tuple(views.values()))


def fuse_adds(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """A product, then Add into the residual: the product adds."""
    names = names_of(program)

    def match(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        if i + 2 > len(ops):
            return None
        product, add = ops[i : i + 2]
        if not (isinstance(product, Product) and isinstance(add, Add)) or product.residual or product.activation:
            return None
        is_residual = (add.a, add.b) in ((add.out, product.out), (product.out, add.out)) and add.a != add.b
        if not is_residual or names.overlap(add.out, product.x) or not names.is_dead(product.out, i + 2):
            return None
        return [replace(product, out=add.out, residual=add.out)], 2

    return replace_ops(program, match)


def fuse_rope(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """Rope of q, Rope of k, KvWrite: one op, with the norms of q and k per head before it where there are any."""
    names = names_of(program)

    def turn_and_write(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        three = [op for op in ops[i : i + 3] if isinstance(op, RopeKv)]
        if len(three) < 3:
            return None
        q, k, write = three
        if not (q.layer == k.layer == -1 and write.layer >= 0 and not write.inv_freq and write.q is None):
            return None
        turn = (q.inv_freq, q.attention_factor, q.head_dim)
        if k.q != write.k or q.q == k.q or turn != (k.inv_freq, k.attention_factor, write.head_dim):
            return None
        if write.k is None or not names.is_dead(write.k, i + 3):
            return None
        return [replace(write, q=q.q, inv_freq=q.inv_freq, attention_factor=q.attention_factor)], 3

    def with_norms(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        if i + 3 > len(ops):
            return None
        q, k, turn = ops[i : i + 3]
        if not (isinstance(q, Norm) and isinstance(k, Norm) and isinstance(turn, RopeKv)):
            return None
        in_place = all(norm.out == norm.x and norm.group == turn.head_dim for norm in (q, k))
        if not in_place or (q.x, k.x) != (turn.q, turn.k) or q.eps != k.eps or turn.q_norm is not None:
            return None
        return [replace(turn, q_norm=q.weight, k_norm=k.weight, eps=q.eps)], 3

    return replace_ops(replace_ops(program, turn_and_write), with_norms)


def fuse_norms(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """A norm of whole rows, then the products that read it, and nobody else does: the products norm what they read."""
    names = names_of(program)

    def match(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        norm = ops[i]
        if not isinstance(norm, Norm) or norm.group != names.width(norm.x) or names.overlap(norm.out, norm.x):
            return None
        products: list[GpuOp] = []
        for op in ops[i + 1 :]:
            if not isinstance(op, Product) or op.x != norm.out or op.norm or op.rope_kv:
                break
            if names.overlap(op.out, norm.x):
                break
            products.append(replace(op, x=norm.x, norm=NormPrologue(norm.weight, norm.eps)))
        if not products or not names.is_dead(norm.out, i + 1 + len(products)):
            return None
        return products, 1 + len(products)

    return replace_ops(program, match) if options.has_norm_prologue else program


def fuse_rope_epilogue(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """The product of q, k and v, then RopeKv: the product turns and writes."""
    names = names_of(program)

    def match(ops: Sequence[GpuOp], i: int) -> tuple[Sequence[GpuOp], int] | None:
        if i + 2 > len(ops):
            return None
        product, turn = ops[i : i + 2]
        if not (isinstance(product, Product) and isinstance(turn, RopeKv)) or product.residual or product.activation:
            return None
        if turn.q is None or turn.k is None or turn.v is None or turn.head_dim not in EPILOGUE_HEAD_DIMS:
            return None
        whole = names.columns(product.out)
        begin = whole.begin
        for name in (turn.q, turn.k, turn.v):
            part = names.columns(name)
            if part.buffer != whole.buffer or part.begin != begin:
                return None
            begin = part.end
        if begin != whole.end or not all(names.is_dead(name, i + 2) for name in (turn.k, turn.v)):
            return None
        return [replace(product, rope_kv=turn)], 2

    return replace_ops(program, match) if options.has_rope_epilogue else program


def _select_early(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    return select_rows_early(program)


def _quantize_inputs(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    return quantize_inputs(program, forms)


def _prepare_norms(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    return prepare_norms(program) if options.has_next_norm else program


def drop_unused(program: GpuProgram, forms: Forms, options: LowerOptions) -> GpuProgram:
    """Buffers and views that no op names any more need no memory."""
    used = {name for op in program.ops for name in (*reads(op), *writes(op))}
    used |= {name for op in program.ops if isinstance(op, Product) and op.rope_kv for name in reads(op.rope_kv)}
    views = tuple(view for view in program.views if view.name in used)
    used |= {view.buffer for view in views}
    return replace(program, views=views, buffers=tuple(buffer for buffer in program.buffers if buffer.name in used))


REWRITES: tuple[Rewrite, ...] = (
    fuse_gates,
    merge_products,
    fuse_adds,
    fuse_rope,
    fuse_norms,
    fuse_rope_epilogue,
    _select_early,
    _quantize_inputs,
    _prepare_norms,
    drop_unused,
)


def num_launches(program: GpuProgram, layer: int) -> int:
    """Kernel launches between the KV write of `layer` and that of the next one, attention counted twice (split-KV and
    its reduction): what the launch audit holds against six."""
    writes_kv = [i for i, op in enumerate(program.ops) if _layer_written(op) >= 0]
    begin = next(i for i in writes_kv if _layer_written(program.ops[i]) == layer)
    end = next((i for i in writes_kv if i > begin), len(program.ops))
    return sum(2 if isinstance(op, Attention) else 1 for op in program.ops[begin:end] if reads(op))


def _layer_written(op: GpuOp) -> int:
    turn = op.rope_kv if isinstance(op, Product) else op if isinstance(op, RopeKv) else None
    return -1 if turn is None else turn.layer
