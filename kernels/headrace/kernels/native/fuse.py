"""From a step program to the one that the native executor runs: packed weights, quantised activations, fused ops.

`lower` translates op by op; each rewrite after it replaces a pattern of neighbouring ops by one op that gives the same
bits (tests/kernels/native/test_fuse.py runs both). What matches no pattern stays as it is. Called by `executor.py`, and
by whoever packs weights ahead of time (`ops.pack_specs` of the result).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from headrace.kernels.native.fuse_rows import select_rows_early
from headrace.kernels.native.ops import (
    GROUP,
    LANES,
    ActivationBits,
    Attention,
    MatMul,
    NativeOp,
    NativeProgram,
    Norm,
    PackSpec,
    QuantBuffer,
    Quantize,
    RopeKv,
    View,
    WeightForm,
    reads,
    writes,
)
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
    SelectRows,
    StepProgram,
)
from headrace.kernels.rewrite import Names, replace_ops

Rewrite = Callable[[NativeProgram, Mapping[str, WeightForm]], NativeProgram]


def fuse(
    program: StepProgram, forms: Mapping[str, WeightForm], *, activation_bits: ActivationBits = 8, head_bits: int = 16
) -> NativeProgram:
    """The program as the native executor runs it best.

    forms: of every matrix of the program (`ops.form_of`). activation_bits: precision of the activations that meet
    quantised weights, but for the output head's, which is `head_bits`.
    """
    program = select_rows_early(program)
    native = lower(program, forms, activation_bits=activation_bits, head_bits=head_bits)
    for rewrite in REWRITES:
        native = rewrite(native, forms)
    return native


def lower(
    program: StepProgram, forms: Mapping[str, WeightForm], *, activation_bits: int = 8, head_bits: int = 16
) -> NativeProgram:
    """Op by op, nothing fused: every quantised product has a Quantize of its own before it."""
    buffers = {buffer.name: buffer for buffer in program.buffers}
    quant_buffers: dict[str, QuantBuffer] = {}
    layouts = program.kv
    ops: list[NativeOp] = []
    for op in program.ops:
        if isinstance(op, Linear) and forms[op.weight].is_quantized:
            bits = head_bits if op.out == program.logits else activation_bits
            if bits not in (8, 16):
                raise ValueError(f"activations have 8 or 16 bits, not {bits}")
            x = buffers[op.x]
            name = f"{op.x}.a{bits}"
            quant_buffers[name] = QuantBuffer(name, x.rows, x.width, 8 if bits == 8 else 16)
            ops += [Quantize(name, op.x), _matmul(op, name)]
        else:
            ops.append(_lower_op(op, [layout.head_dim for layout in layouts]))
    matrices = {spec.name for spec in program.weights if len(spec.shape) == 2}
    return NativeProgram(
        buffers=program.buffers,
        quant_buffers=tuple(quant_buffers.values()),
        views=(),
        ops=tuple(ops),
        matrices=tuple(PackSpec(spec.name, (spec.name,)) for spec in program.weights if spec.name in matrices),
        vectors=tuple(spec for spec in program.weights if spec.name not in matrices),
        kv=program.kv,
        vocab_size=program.vocab_size,
        logits=program.logits,
    )


def _matmul(op: Linear, x: str) -> MatMul:
    return MatMul(op.out, x, op.weight, () if op.bias is None else (op.bias,))


def _lower_op(op: Op, head_dims: Sequence[int]) -> NativeOp:
    if isinstance(op, Linear):
        return _matmul(op, op.x)
    if isinstance(op, RmsNorm):
        return Norm(op.out, op.x, op.weight, op.eps, op.group)
    if isinstance(op, Rope):
        return RopeKv(op.x, None, None, 0, op.head_dim, op.inv_freq, op.attention_factor)
    if isinstance(op, KvWrite):
        return RopeKv(None, op.k, op.v, op.layer, head_dims[op.layer])
    if isinstance(op, PagedAttention):
        return Attention(op.out, op.q, op.layer, op.num_heads, op.scale, op.window, op.soft_cap)
    return op


def _names(program: NativeProgram) -> Names[NativeOp]:
    buffers: list[Buffer | QuantBuffer] = [*program.buffers, *program.quant_buffers]
    return Names(buffers, program.views, program.ops, reads, writes, program.logits)


_Match = Callable[[Sequence[NativeOp], int], "tuple[Sequence[NativeOp], int] | None"]


def _replace(program: NativeProgram, match: _Match) -> NativeProgram:
    return replace(program, ops=replace_ops(program.ops, match))


def quantize_once(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """Drop a Quantize whose result is still there."""
    names = _names(program)
    ops: list[NativeOp] = []
    valid: dict[str, str] = {}  # quantised buffer -> what it was made of
    for op in program.ops:
        if isinstance(op, Quantize) and valid.get(op.out) == op.x:
            continue
        for written in writes(op):
            valid = {out: x for out, x in valid.items() if out != written and not names.overlap(x, written)}
        if isinstance(op, Quantize):
            valid[op.out] = op.x
        ops.append(op)
    return replace(program, ops=tuple(ops))


def fuse_gates(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """Products for gate and up, then GatedActivation: one product with a gated matrix."""
    names = _names(program)
    specs: dict[str, PackSpec] = {spec.name: spec for spec in program.matrices}

    def match(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        if i + 3 > len(ops):
            return None
        gate, up, act = ops[i : i + 3]
        if not (isinstance(gate, MatMul) and isinstance(up, MatMul) and isinstance(act, GatedActivation)):
            return None
        fits = (act.gate, act.up) == (gate.out, up.out) and gate.out != up.out and gate.x == up.x
        plain = not (gate.bias or up.bias) and gate.epilogue == up.epilogue == "store"
        if not (fits and plain and forms[gate.matrix] == forms[up.matrix] and names.width(act.out) % GROUP == 0):
            return None
        if names.overlap(act.out, gate.x) or not all(names.is_dead(name, i + 3) for name in (act.gate, act.up)):
            return None
        spec = PackSpec(f"{gate.matrix}+{up.matrix}", (gate.matrix, up.matrix), is_gated=True)
        specs[spec.name] = spec
        epilogue = "silu_gate" if act.kind == "silu" else "gelu_gate"
        return [MatMul(act.out, gate.x, spec.name, epilogue=epilogue)], 3  # type: ignore[arg-type]

    program = _replace(program, match)
    return replace(program, matrices=tuple(specs.values()))


def merge_products(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """Neighbouring products of one input become one with the rows of all; their outputs become columns of one buffer.

    The columns are laid out alike for the whole program; products whose weights differ in form write their own part.
    """
    program = _lay_out(program)
    views = {view.name: view for view in program.views}
    specs = {spec.name: spec for spec in program.matrices}

    def match(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        run = _run(ops, i)
        if not run or run[0].out not in views:
            return None
        first = views[run[0].out]
        end, taken = first.column, []
        for op in run:
            view = views.get(op.out or "")
            same = forms[op.matrix] == forms[run[0].matrix] and bool(op.bias) == bool(run[0].bias)
            if view is None or (view.buffer, view.column) != (first.buffer, end) or not same:
                break
            end += view.width
            taken.append(op)
        if len(taken) < 2:
            return None
        spec = PackSpec("+".join(op.matrix for op in taken), tuple(op.matrix for op in taken))
        out = "+".join(op.out or "" for op in taken)
        width = end - first.column
        specs[spec.name] = spec
        if out != first.buffer:
            views[out] = View(out, first.buffer, first.column, width)
        bias = tuple(name for op in taken for name in op.bias)
        return [MatMul(out, run[0].x, spec.name, bias)], len(taken)

    program = _replace(program, match)
    return replace(program, views=tuple(views.values()), matrices=tuple(specs.values()))


def _run(ops: Sequence[NativeOp], i: int) -> list[MatMul]:
    """The products of one input that follow each other from op i on, each to a buffer of its own."""
    run: list[MatMul] = []
    for op in ops[i:]:
        if not isinstance(op, MatMul) or op.epilogue != "store" or op.out is None or op.x == op.out:
            break
        if run and (op.x != run[0].x or op.out in [other.out for other in run]):
            break
        run.append(op)
    return run


def _lay_out(program: NativeProgram) -> NativeProgram:
    """Give the outputs of each run of products one buffer, side by side, where every part starts on a cache line."""
    buffers = {buffer.name: buffer for buffer in program.buffers}
    views = {view.name: view for view in program.views}
    i = 0
    while i < len(program.ops):
        run = _run(program.ops, i)
        outs = [op.out for op in run if op.out is not None]
        i += max(1, len(run))
        if len(outs) < 2 or program.logits in outs or any(name not in buffers for name in outs):
            continue
        parts = [buffers[name] for name in outs]
        if any(part.width % LANES or part.rows != parts[0].rows for part in parts):
            continue
        merged = Buffer("+".join(outs), parts[0].rows, sum(part.width for part in parts))
        column = 0
        for part in parts:
            views[part.name] = View(part.name, merged.name, column, part.width)
            column += part.width
            del buffers[part.name]
        buffers[merged.name] = merged
    return replace(program, buffers=tuple(buffers.values()), views=tuple(views.values()))


def fuse_adds(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """A product, then Add into the residual: the product adds."""
    names = _names(program)

    def match(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        if i + 2 > len(ops):
            return None
        product, add = ops[i : i + 2]
        if not (isinstance(product, MatMul) and isinstance(add, Add)) or product.epilogue != "store":
            return None
        is_residual = (add.a, add.b) in ((add.out, product.out), (product.out, add.out)) and add.a != add.b
        if not is_residual or product.out is None or names.overlap(add.out, product.x):
            return None
        if not names.is_dead(product.out, i + 2):
            return None
        return [replace(product, out=add.out, epilogue="add")], 2

    return _replace(program, match)


def fuse_selection(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """SelectRows, then Norm: the norm reads the rows where they are."""
    names = _names(program)

    def match(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        if i + 2 > len(ops):
            return None
        select, norm = ops[i : i + 2]
        if not (isinstance(select, SelectRows) and isinstance(norm, Norm)) or norm.x != select.out:
            return None
        if norm.out == select.out or not names.is_dead(select.out, i + 2):
            return None
        return [replace(norm, x=select.x, selects_rows=True)], 2

    return _replace(program, match)


def fuse_quantize(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """A norm, attention or gated product, then Quantize of its result: it quantises itself. The float32 result goes
    where nobody else reads it."""
    names = _names(program)

    def match(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        if i + 2 > len(ops):
            return None
        producer, quantize = ops[i : i + 2]
        if not isinstance(quantize, Quantize) or not isinstance(producer, (Norm, Attention, MatMul)):
            return None
        if producer.out != quantize.x or producer.quantized is not None:
            return None
        if isinstance(producer, Attention) and program.kv[producer.layer].head_dim % GROUP:
            return None  # a group would hold the heads of two threads
        is_dead = names.is_dead(quantize.x, i + 2)
        if isinstance(producer, MatMul) and (producer.epilogue in ("store", "add") or not is_dead):
            return None
        out = None if is_dead else producer.out
        return [replace(producer, out=out, quantized=quantize.out)], 2

    return _replace(program, match)


def fuse_rope(program: NativeProgram, forms: Mapping[str, WeightForm]) -> NativeProgram:
    """Rope of q, Rope of k, KvWrite: one op, with the norms of q and k per head before it where there are any."""
    names = _names(program)

    def turn_and_write(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        three = ops[i : i + 3]
        if len(three) < 3 or not all(isinstance(op, RopeKv) for op in three):
            return None
        q, k, write = (op for op in three if isinstance(op, RopeKv))
        if q.q is None or q.k is not None or k.k is not None or write.q is not None or write.inv_freq:
            return None
        turn = (q.inv_freq, q.attention_factor, q.head_dim)
        if k.q != write.k or q.q == k.q or turn != (k.inv_freq, k.attention_factor, write.head_dim):
            return None
        if write.k is None or not names.is_dead(write.k, i + 3):
            return None
        return [replace(write, q=q.q, inv_freq=q.inv_freq, attention_factor=q.attention_factor)], 3

    def with_norms(ops: Sequence[NativeOp], i: int) -> tuple[Sequence[NativeOp], int] | None:
        if i + 3 > len(ops):
            return None
        q, k, turn = ops[i : i + 3]
        if not (isinstance(q, Norm) and isinstance(k, Norm) and isinstance(turn, RopeKv)):
            return None
        in_place = all(norm.out == norm.x and norm.group == turn.head_dim and not norm.quantized for norm in (q, k))
        if not in_place or (q.x, k.x) != (turn.q, turn.k) or q.eps != k.eps or turn.q_norm is not None:
            return None
        return [replace(turn, q_norm=q.weight, k_norm=k.weight, eps=q.eps)], 3

    return _replace(_replace(program, turn_and_write), with_norms)


REWRITES: tuple[Rewrite, ...] = (
    quantize_once,
    fuse_gates,
    merge_products,
    fuse_adds,
    fuse_selection,
    fuse_quantize,
    fuse_rope,
)
