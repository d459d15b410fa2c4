"""The step program as the native executor runs it: ops that read and write packed weights and quantised activations.

`fuse.py` makes it from a `headrace.kernels.program.StepProgram`, `encode.py` hands it to C++. Like the step program it
is a list of frozen dataclasses over named buffers, with two things more: a buffer may hold quantised rows, and a name
may be a range of columns of a wider buffer (`View`), so that one product writes q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from headrace.kernels.program import Add, Buffer, Embed, GatedActivation, KvLayout, SelectRows, SoftCap, WeightSpec
from headrace.kernels.quant import QuantTensor, Weight

Epilogue = Literal["store", "add", "silu_gate", "gelu_gate"]
ActivationBits = Literal[8, 16]

LANES = 16  # kLanes of csrc/layout.h: rows of a weight panel
GROUP = 32  # kGroup of csrc/layout.h: features of a weight block and of an activation group


@dataclass(frozen=True)
class WeightForm:
    """How a matrix is stored once packed (matrix.py); weights of one form can be joined without making any larger.

    has_narrow_groups: scales for 16 features instead of 32. is_two_level: scales are integers, with a float16 for 256
    features (QuantTensor.two_level).
    """

    kind: Literal["int4", "int8", "dense"]
    has_narrow_groups: bool = False
    has_zeros: bool = False
    is_two_level: bool = False

    @property
    def is_quantized(self) -> bool:
        """Whether products with it want quantised activations."""
        return self.kind != "dense"


def form_of(weight: Weight) -> WeightForm:
    """The form in which a loaded matrix is packed."""
    if not isinstance(weight, QuantTensor) or weight.shape[1] % GROUP:
        return WeightForm("dense")
    if weight.group_size != 16 and weight.group_size % GROUP:
        return WeightForm("dense")
    return WeightForm(weight.kind, weight.group_size == 16, weight.zeros is not None, weight.two_level is not None)


@dataclass(frozen=True)
class PackSpec:
    """One packed matrix (csrc/layout.h, PackedMatrix): the rows of `sources` one after the other, or, `is_gated`, of
    two sources (gate, up) interleaved 32 and 32."""

    name: str
    sources: tuple[str, ...]
    is_gated: bool = False


@dataclass(frozen=True)
class QuantBuffer:
    """Activations quantised in groups of 32 features, [number of `rows`, `width`]."""

    name: str
    rows: Literal["tokens", "logits"]
    width: int
    bits: ActivationBits


@dataclass(frozen=True)
class View:
    """Columns [column, column + width) of a float32 buffer under a name of their own."""

    name: str
    buffer: str
    column: int
    width: int


@dataclass(frozen=True)
class Quantize:
    """out = x, quantised."""

    out: str
    x: str


@dataclass(frozen=True)
class MatMul:
    """x @ matrix.T (+ bias): stored, added to out, or a gated matrix's act(gate) * up, which may go to `quantized`.

    x is float32 for a dense matrix and quantised for the integer kinds. matrix: the name of a PackSpec. bias: names
    of vectors that together are as long as the matrix has rows, or (). One of out and quantized is given.
    """

    out: str | None
    x: str
    matrix: str
    bias: tuple[str, ...] = ()
    epilogue: Epilogue = "store"
    quantized: str | None = None


@dataclass(frozen=True)
class Norm:
    """RmsNorm, to float32 and/or quantised. selects_rows: row i of the output is made of row logit_rows[i] of x."""

    out: str | None
    x: str
    weight: str
    eps: float
    group: int
    quantized: str | None = None
    selects_rows: bool = False


@dataclass(frozen=True)
class RopeKv:
    """Turn q and k in place, normed per head before where q_norm and k_norm are given; write k and v into `layer`.

    k None: q alone is turned. q None: k and v are written as they are. inv_freq (): no rotation. After it k may hold
    anything.
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
class Attention:
    """PagedAttention, to float32 and/or quantised."""

    out: str | None
    q: str
    layer: int
    num_heads: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0
    quantized: str | None = None


NativeOp = (
    Embed | Quantize | MatMul | Norm | RopeKv | Attention | Add | GatedActivation | SelectRows | SoftCap
)  # Embed.table is a matrix


@dataclass(frozen=True)
class NativeProgram:
    """A step program for the native executor.

    buffers: float32. matrices: what is packed. vectors: float32 weights, norms and biases. The buffer `logits` holds
    the logits after the last op.
    """

    buffers: tuple[Buffer, ...]
    quant_buffers: tuple[QuantBuffer, ...]
    views: tuple[View, ...]
    ops: tuple[NativeOp, ...]
    matrices: tuple[PackSpec, ...]
    vectors: tuple[WeightSpec, ...]
    kv: tuple[KvLayout, ...]
    vocab_size: int
    logits: str


def pack_specs(program: NativeProgram) -> tuple[PackSpec, ...]:
    """What must be packed before the program can run: the contents of the cache on disk. Names are unique."""
    used = {op.matrix for op in program.ops if isinstance(op, MatMul)}
    used |= {op.table for op in program.ops if isinstance(op, Embed)}
    return tuple(spec for spec in program.matrices if spec.name in used)


def reads(op: NativeOp) -> tuple[str, ...]:
    """Names of the buffers that an op reads; what it changes in place is among them."""
    if isinstance(op, Embed):
        return ()
    if isinstance(op, MatMul):
        return (op.x, op.out) if op.epilogue == "add" and op.out is not None else (op.x,)
    if isinstance(op, RopeKv):
        return tuple(name for name in (op.q, op.k, op.v) if name is not None)
    if isinstance(op, Attention):
        return (op.q,)
    if isinstance(op, Add):
        return (op.a, op.b)
    if isinstance(op, GatedActivation):
        return (op.gate, op.up)
    return (op.x,)


def writes(op: NativeOp) -> tuple[str, ...]:
    """Names of the buffers that an op writes."""
    if isinstance(op, (MatMul, Norm, Attention)):
        return tuple(name for name in (op.out, op.quantized) if name is not None)
    if isinstance(op, RopeKv):
        return tuple(name for name in (op.q, op.k) if name is not None)
    return (op.x,) if isinstance(op, SoftCap) else (op.out,)
