"""The step program as the GPU runs it: few fused ops over packed weights, each one launch (attention: two).

`lower.py` makes it from a `headrace.kernels.program.StepProgram`; `executor.py` runs it. Like the step program it is a
list of frozen dataclasses over named buffers, with one thing more: a name may be a range of columns of a wider buffer
(`View`), so that one product writes q, k and v. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.kernels.program import Add, Buffer, GatedActivation, KvLayout, SelectRows, SoftCap, WeightSpec
from headrace.kernels.quant import QuantTensor, Weight

Activation = Literal["silu", "gelu_tanh"]
# Weights and what they multiply in 8 bits (`headrace.kernels.linear.quantize`): no file's own, made at load.
QuantizedKind = Literal["w8a8", "fp8", "fp8_block"]


@dataclass(frozen=True)
class WeightForm:
    """How a matrix is stored once packed; matrices of one form can be joined in one product.

    kind: of QuantTensor, "dense", or what it is quantised to at load. group_size: 0 but for int4 and int8.
    """

    kind: Literal["int4", "int8", "dense"] | QuantizedKind
    group_size: int = 0
    has_zeros: bool = False


def form_of(weight: Weight) -> WeightForm:
    """The form in which a loaded matrix is packed."""
    if not isinstance(weight, QuantTensor):
        return WeightForm("dense")
    return WeightForm(weight.kind, weight.group_size, weight.zeros is not None)


@dataclass(frozen=True)
class PackSpec:
    """One packed matrix: the rows of `sources` one after the other, or, `is_gated`, of two sources (gate, up) as
    `headrace.kernels.linear.pack` interleaves them. quantized: what they become at load; None: what the file has."""

    name: str
    sources: tuple[str, ...]
    is_gated: bool = False
    quantized: QuantizedKind | None = None


@dataclass(frozen=True)
class TypedBuffer(Buffer):
    """A buffer of its own type: rows in 8 bits, or float32 scales."""

    kind: Literal["int8", "fp8", "fp32"]


@dataclass(frozen=True)
class View:
    """Columns [column, column + width) of a buffer under a name of their own."""

    name: str
    buffer: str
    column: int
    width: int


@dataclass(frozen=True)
class NormPrologue:
    """RmsNorm over whole rows of a product's input, done while the product reads it."""

    weight: str
    eps: float


@dataclass(frozen=True)
class NextNorm:
    """RmsNorm(weight, eps) of a product's output, prepared by it: `normed` gets out * weight, `squares` the sums of
    squares from which those who read `normed` make each row's factor."""

    normed: str
    squares: str
    weight: str
    eps: float


@dataclass(frozen=True)
class Embed:
    """out[t] = table[token_ids[t]] * scale. table: the name of a PackSpec."""

    out: str
    table: str
    scale: float


@dataclass(frozen=True)
class Norm:
    """As program.RmsNorm; with out_scale the rows of `out` are quantised, as by QuantizeRows."""

    out: str
    x: str
    weight: str
    eps: float
    group: int
    out_scale: str | None = None


@dataclass(frozen=True)
class QuantizeRows:
    """out * out_scale = x, as near as the type of `out` allows. out_scale: a scale per row, or per 128 columns."""

    out: str
    out_scale: str
    x: str


@dataclass(frozen=True)
class QuantizeGated:
    """As QuantizeRows, of act(gate) * up."""

    out: str
    out_scale: str
    gate: str
    up: str
    kind: Activation


@dataclass(frozen=True)
class RopeKv:
    """Turn q and k, normed per head before where q_norm and k_norm are given; write k and v into `layer`.

    q is changed in place; after it k may hold anything. inv_freq (): no rotation. q None: only k and v are written;
    layer -1: only q is turned, and k and v are None.
    """

    q: str | None
    k: str | None
    v: str | None
    layer: int
    head_dim: int
    inv_freq: tuple[float, ...] = ()
    attention_factor: float = 1.0
    q_norm: str | None = None
    k_norm: str | None = None
    eps: float = 0.0


@dataclass(frozen=True)
class Product:
    """norm(x) @ matrix.T (+ bias), then one epilogue: act(gate) * up of a gated matrix, + residual, or RopeKv.

    matrix: the name of a PackSpec. x_scale: scales of rows in 8 bits. bias: vectors that together are as long as the
    matrix has rows, or (). residual may be `out`. rope_kv: the product's columns are q, k and v; what stays in `out` is
    q, turned; k and v go to the KV blocks and their columns of `out` may hold anything afterwards. squares, eps: x is
    what a NextNorm calls `normed`. next_norm: the norm of `out` that it prepares. out_scale: `out` is quantised, as by
    QuantizeRows.
    """

    out: str
    x: str
    matrix: str
    norm: NormPrologue | None = None
    bias: tuple[str, ...] = ()
    residual: str | None = None
    activation: Activation | None = None
    rope_kv: RopeKv | None = None
    x_scale: str | None = None
    squares: str | None = None
    eps: float = 0.0
    next_norm: NextNorm | None = None
    out_scale: str | None = None


@dataclass(frozen=True)
class Attention:
    """As program.PagedAttention."""

    out: str
    q: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0


GpuOp = (
    Embed
    | Norm
    | QuantizeRows
    | QuantizeGated
    | RopeKv
    | Product
    | Attention
    | Add
    | GatedActivation
    | SelectRows
    | SoftCap
)


@dataclass(frozen=True)
class GpuProgram:
    """A step program for the GPU.

    matrices: what is packed. vectors: norms and biases. After the last op the buffer `logits`, float32, holds the
    logits; every other buffer is of the compute dtype, unless it is a TypedBuffer.
    """

    buffers: tuple[Buffer, ...]
    views: tuple[View, ...]
    ops: tuple[GpuOp, ...]
    matrices: tuple[PackSpec, ...]
    vectors: tuple[WeightSpec, ...]
    kv: tuple[KvLayout, ...]
    vocab_size: int
    logits: str


def pack_specs(program: GpuProgram) -> tuple[PackSpec, ...]:
    """What must be packed before the program can run."""
    used = {op.matrix for op in program.ops if isinstance(op, Product)}
    used |= {op.table for op in program.ops if isinstance(op, Embed)}
    return tuple(spec for spec in program.matrices if spec.name in used)


def reads(op: GpuOp) -> tuple[str, ...]:
    """Names of the buffers that an op reads; what it changes in place is among them."""
    if isinstance(op, Embed):
        return ()
    if isinstance(op, Product):
        return tuple(name for name in (op.x, op.x_scale, op.squares, op.residual) if name is not None)
    if isinstance(op, RopeKv):
        return tuple(name for name in (op.q, op.k, op.v) if name is not None)
    if isinstance(op, Attention):
        return (op.q,)
    if isinstance(op, Add):
        return (op.a, op.b)
    if isinstance(op, (GatedActivation, QuantizeGated)):
        return (op.gate, op.up)
    return (op.x,)


def writes(op: GpuOp) -> tuple[str, ...]:
    """Names of the buffers that an op writes."""
    if isinstance(op, RopeKv):
        return tuple(name for name in (op.q, op.k) if name is not None)
    if isinstance(op, Product) and op.next_norm is not None:
        return (op.out, op.next_norm.normed, op.next_norm.squares)
    if isinstance(op, (Norm, QuantizeRows, QuantizeGated, Product)):
        return (op.out,) if op.out_scale is None else (op.out, op.out_scale)
    return (op.x,) if isinstance(op, SoftCap) else (op.out,)


def describe(op: GpuOp) -> str:
    """One line for logs, profiles and the launch audit."""
    if isinstance(op, Product):
        parts = [f"{op.x} @ {op.matrix}"]
        parts += ["norm"] if op.norm or op.squares else []
        parts += ["bias"] if op.bias else []
        parts += [op.activation] if op.activation else []
        parts += ["rope_kv"] if op.rope_kv else []
        parts += ["residual"] if op.residual else []
        parts += ["next norm"] if op.next_norm else []
        return f"product {' + '.join(parts)} -> {op.out}"
    return f"{type(op).__name__.lower()} {', '.join(reads(op))} -> {', '.join(writes(op))}"
