"""The step program: one decoder forward pass as a flat list of ops over named buffers.

A decoder (`headrace.models.decoder`) emits it once per model; an executor runs it once per step. It is data: it can be
printed, checked op by op against the reference, priced in bytes and operations, and rewritten (fusions). It stays a
list of frozen dataclasses; there is no graph compiler.

Buffers are float32 [rows, width]. `rows` is "tokens" (every row of the step's batch) or "logits" (only the rows
whose logits somebody wants). Weights are named; linear weights are [out_features, in_features]. The batch's own
arrays (`headrace.kernels.batch.StepBatch`: token ids, positions, slot mapping, block tables ...) are implicit inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rows = Literal["tokens", "logits"]


@dataclass(frozen=True)
class Buffer:
    """An activation, float32 [number of `rows`, `width`]."""

    name: str
    rows: Rows
    width: int


@dataclass(frozen=True)
class Embed:
    """out[t] = table[token_ids[t]] * scale."""

    out: str
    table: str
    scale: float


@dataclass(frozen=True)
class RmsNorm:
    """Per row and group of `group` columns: out = x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019).

    weight is float32 [group]; group equals the width of x, or head_dim for QK-norm. `out` may be `x`.
    """

    out: str
    x: str
    weight: str
    eps: float
    group: int


@dataclass(frozen=True)
class Linear:
    """out = x @ weight.T (+ bias)."""

    out: str
    x: str
    weight: str
    bias: str | None = None


@dataclass(frozen=True)
class Add:
    """out = a + b. `out` may be `a` or `b`."""

    out: str
    a: str
    b: str


@dataclass(frozen=True)
class GatedActivation:
    """out = act(gate) * up; act is SiLU, or the tanh form of GELU."""

    out: str
    gate: str
    up: str
    kind: Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding in place (Su et al. 2021), the halves form: element i of a head turns with element
    i + head_dim / 2 by the angle positions[t] * inv_freq[i]; `attention_factor` scales cos and sin (YaRN)."""

    x: str
    head_dim: int
    inv_freq: tuple[float, ...]
    attention_factor: float = 1.0


@dataclass(frozen=True)
class KvWrite:
    """Write rows k and v, [tokens, num_kv_heads * head_dim], into the KV blocks of `layer` at slot_mapping."""

    layer: int
    k: str
    v: str


@dataclass(frozen=True)
class PagedAttention:
    """Causal attention of each sequence's query rows over its KV blocks, query heads grouped over KV heads (GQA).

    A query at position p sees keys at positions p - window + 1 .. p (window 0: all up to p). With soft_cap > 0,
    scores s become soft_cap * tanh(s / soft_cap). Scores are scaled by `scale` first.
    """

    out: str
    q: str
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    soft_cap: float = 0.0


@dataclass(frozen=True)
class SelectRows:
    """out[i] = x[logit_rows[i]]: only rows whose logits are wanted go on to the output head."""

    out: str
    x: str


@dataclass(frozen=True)
class SoftCap:
    """x = cap * tanh(x / cap), in place."""

    x: str
    cap: float


Op = Embed | RmsNorm | Linear | Add | GatedActivation | Rope | KvWrite | PagedAttention | SelectRows | SoftCap


@dataclass(frozen=True)
class KvLayout:
    """What one layer keeps per token: K and V of [num_kv_heads, head_dim] each. window > 0: only that many
    positions back are ever read."""

    num_kv_heads: int
    head_dim: int
    window: int = 0


@dataclass(frozen=True)
class WeightSpec:
    """A weight that the program reads: name and shape ([out, in] for matrices, [n] for vectors)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StepProgram:
    """One forward pass. After the last op the buffer `logits`, [logits, vocab_size], holds the logits."""

    buffers: tuple[Buffer, ...]
    ops: tuple[Op, ...]
    weights: tuple[WeightSpec, ...]
    kv: tuple[KvLayout, ...]
    vocab_size: int
    logits: str = "logits"
