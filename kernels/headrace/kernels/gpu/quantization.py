"""Serving in 8 bits what a file stores in more, or otherwise: which matrices become what, where that can be computed,
and the launches that bring the activations into 8 bits too.

`--quantization` names the kind. Quantised are the matrices of the layers; the embedding and the output head keep the
file's form, as users of vLLM expect. Activations are quantised row by row as the step goes ("dynamic"): by the norm
before a product where there is one, else by a launch of their own. `lower.py` calls the rewrite; the server and the
executor's caller ask for forms. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from headrace.kernels.gpu.names import names_of
from headrace.kernels.gpu.ops import (
    GpuOp,
    GpuProgram,
    Norm,
    NormPrologue,
    Product,
    QuantizedKind,
    QuantizeGated,
    QuantizeRows,
    TypedBuffer,
    WeightForm,
    writes,
)
from headrace.kernels.program import Buffer, Embed, GatedActivation, Linear, StepProgram

# What the option is called, and the kind of `headrace.kernels.linear`.
KINDS: Mapping[str, QuantizedKind] = {"int8": "w8a8", "fp8": "fp8", "fp8-block": "fp8_block"}
BLOCK = 128  # rows and columns per scale of fp8_block
FP8_CAPABILITY = (8, 9)  # Ada: the first matrix unit that multiplies e4m3
_QUANTIZED = ("w8a8", "fp8", "fp8_block")


def quantized_forms(program: StepProgram, forms: Mapping[str, WeightForm], quantization: str) -> dict[str, WeightForm]:
    """The forms of all matrices under `quantization`: a key of KINDS, or "none"."""
    if quantization == "none":
        return dict(forms)
    form = WeightForm(KINDS[quantization])
    kept = {op.table for op in program.ops if isinstance(op, Embed)}
    kept |= {op.weight for op in program.ops if isinstance(op, Linear) and op.out == program.logits}
    return {name: old if name in kept else form for name, old in forms.items()}


def problem_of(quantization: str, capability: tuple[int, int] | None, gpu: str) -> str:
    """Why this GPU cannot compute so, or "". capability None: no GPU, Triton's interpreter, which can."""
    if not quantization.startswith("fp8") or capability is None or capability >= FP8_CAPABILITY:
        return ""
    has, least = (".".join(map(str, numbers)) for numbers in (capability, FP8_CAPABILITY))
    return (
        f"--quantization {quantization} needs a GPU that multiplies fp8, compute capability {least} or newer (Ada, "
        f"Hopper, Blackwell); {gpu} has {has} and can do --quantization int8"
    )


def quantize_inputs(program: GpuProgram, forms: Mapping[str, WeightForm]) -> GpuProgram:
    """Products with matrices of 8 bits get inputs of 8 bits: their norm writes them, or the activation before, or a
    launch that does nothing else. What was quantised already, and has not changed since, is used again."""
    kinds = {spec.name: forms[spec.sources[0]].kind for spec in program.matrices}
    if not any(kind in _QUANTIZED for kind in kinds.values()):
        return program
    maker = _Maker(program, kinds)
    for index, op in enumerate(program.ops):
        if isinstance(op, Product) and kinds[op.matrix] in _QUANTIZED:
            op = maker.quantize(op, cast(QuantizedKind, kinds[op.matrix]), index)
        maker.add(op)
    matrices = tuple(
        replace(spec, quantized=cast(QuantizedKind, kinds[spec.name]) if kinds[spec.name] in _QUANTIZED else None)
        for spec in program.matrices
    )
    return replace(program, ops=tuple(maker.ops), buffers=tuple(maker.buffers.values()), matrices=matrices)


@dataclass(frozen=True)
class _Source:
    """What a quantised buffer holds."""

    x: str
    norm: NormPrologue | None


class _Maker:
    """The ops so far, and what of the buffers they have quantised."""

    def __init__(self, program: GpuProgram, kinds: Mapping[str, str]) -> None:
        self._kinds = kinds
        self.ops: list[GpuOp] = []
        self.buffers: dict[str, Buffer] = {buffer.name: buffer for buffer in program.buffers}
        self._names = names_of(program)
        self._rows = {buffer.name: buffer.rows for buffer in program.buffers}
        self._rows |= {view.name: self._rows[view.buffer] for view in program.views}
        self._held: dict[str, _Source] = {}

    def add(self, op: GpuOp) -> None:
        self.ops.append(op)
        changed = [name for name in writes(op) if name in self._rows]
        for name, source in list(self._held.items()):
            if any(self._names.overlap(other, source.x) for other in changed):
                del self._held[name]

    def quantize(self, op: Product, kind: QuantizedKind, index: int) -> Product:
        """The product, reading 8 bits; what makes them has been added. index: of the op in the program."""
        source = _Source(op.x, op.norm)
        out, scale = self._buffers_for(op.x, kind)
        if self._held.get(out) != source:
            self._held[out] = source
            self.ops.append(self._producer(op, out, scale, kind, index))
        return replace(op, x=out, x_scale=scale, norm=None)

    def _producer(self, op: Product, out: str, scale: str, kind: QuantizedKind, index: int) -> GpuOp:
        if op.norm is not None:
            return Norm(out, op.x, op.norm.weight, op.norm.eps, self._names.width(op.x), scale)
        last = self.ops[-1]
        if isinstance(last, GatedActivation) and last.out == op.x and self._names.is_dead(op.x, index + 1):
            self.ops.pop()
            return QuantizeGated(out, scale, last.gate, last.up, last.kind)
        if self._can_end_in_blocks(last, op, kind, index):
            self.ops.pop()
            return replace(last, out=out, out_scale=scale)  # type: ignore[arg-type]
        return QuantizeRows(out, scale, op.x)

    def _can_end_in_blocks(self, last: GpuOp, op: Product, kind: QuantizedKind, index: int) -> bool:
        """Whether the op before is a product that can quantise what `op` alone reads, by 128 columns in a tile."""
        if not isinstance(last, Product) or kind != "fp8_block" or self._kinds[last.matrix] != kind:
            return False
        is_plain = last.residual is None and last.rope_kv is None
        return is_plain and last.out == op.x and self._names.is_dead(op.x, index + 1)

    def _buffers_for(self, x: str, kind: QuantizedKind) -> tuple[str, str]:
        """Names of x in 8 bits and of its scales."""
        out, scale, width, rows = f"{x}.{kind}", f"{x}.{kind}.scale", self._names.width(x), self._rows[x]
        self.buffers[out] = TypedBuffer(out, rows, width, "int8" if kind == "w8a8" else "fp8")
        self.buffers[scale] = TypedBuffer(scale, rows, -(-width // BLOCK) if kind == "fp8_block" else 1, "fp32")
        return out, scale
