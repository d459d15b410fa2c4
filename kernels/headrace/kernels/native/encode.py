"""A native program as the C structs of csrc/headrace_native.h, handed to the library once. Called by `executor.py`.

The structs' fields are declared in the order of the header; a test compares the sizes with the compiler's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from headrace.kernels.native.matrix import MatrixStruct
from headrace.kernels.native.ops import (
    Attention,
    MatMul,
    NativeOp,
    NativeProgram,
    Norm,
    QuantBuffer,
    Quantize,
    RopeKv,
    pack_specs,
)
from headrace.kernels.program import Add, Buffer, Embed, GatedActivation, SelectRows, SoftCap
from headrace.kernels.quant import QuantTensor, Weight

NONE = -1
# HrOpKind
EMBED, QUANTIZE, LINEAR, NORM, ROPE_KV, ATTENTION, ADD, SILU_GATE, GELU_GATE, SELECT, SOFT_CAP = range(11)
KIND_NAMES = (
    *("embed", "quantize", "linear", "norm", "rope_kv", "attention", "add", "silu_gate", "gelu_gate", "select"),
    "soft_cap",
)
_EPILOGUES = {"store": 0, "add": 1, "silu_gate": 2, "gelu_gate": 3}  # Epilogue of csrc/kernel_table.h


class HrVector(Structure):
    """One float32 vector."""

    _fields_ = [("data", c_void_p), ("size", c_int64)]


class HrBuffer(Structure):
    """An activation."""

    _fields_ = [("is_logits", c_int32), ("bits", c_int32), ("width", c_int32)]


class HrOperand(Structure):
    """Columns of a buffer."""

    _fields_ = [("buffer", c_int32), ("column", c_int32), ("width", c_int32)]


class HrRope(Structure):
    """A rotation."""

    _fields_ = [("inv_freq", c_void_p), ("half", c_int32), ("attention_factor", c_float)]


class HrKvShape(Structure):
    """A layer's keys and values."""

    _fields_ = [("num_kv_heads", c_int32), ("head_dim", c_int32)]


_OP_INDICES = ("a", "b", "c", "out", "quantized", "matrix", "vector", "vector2", "rope", "layer")
_OP_NUMBERS = ("epilogue", "group", "num_heads", "window", "selects_rows")
_OP_FLOATS = ("eps", "scale", "soft_cap")


class HrOp(Structure):
    """One op; indices are NONE where there is nothing."""

    _fields_ = [
        ("kind", c_int32),
        *((name, c_int32) for name in _OP_INDICES + _OP_NUMBERS),
        *((name, c_float) for name in _OP_FLOATS),
    ]


_ARRAYS = {
    "matrices": MatrixStruct,
    "vectors": HrVector,
    "buffers": HrBuffer,
    "operands": HrOperand,
    "ropes": HrRope,
    "layers": HrKvShape,
    "ops": HrOp,
}
_NUMBERS = (
    *("logits", "vocab_size", "num_blocks", "block_size", "kv_kind", "max_tokens", "max_logit_rows", "num_threads"),
    *("is_profiled", "test_fault"),
)


class HrExecutorConfig(Structure):
    """Everything that hr_executor_create is told."""

    _fields_ = [
        *((name, POINTER(struct)) for name, struct in _ARRAYS.items()),
        *((f"num_{name}", c_int32) for name in _ARRAYS),
        *((name, c_int32) for name in _NUMBERS),
    ]


@dataclass(frozen=True)
class Encoded:
    """The program's part of a config. `config` points into `keep`, which must live until it was handed over.

    ops_of_kind: the kind of every op, an index into KIND_NAMES.
    """

    config: HrExecutorConfig
    keep: tuple[Any, ...]
    kinds: tuple[int, ...]


def encode(program: NativeProgram, matrices: Mapping[str, MatrixStruct], weights: Mapping[str, Weight]) -> Encoded:
    """matrices: one per `pack_specs(program)`. weights: holds the program's vectors, float32 or what casts to it.

    Raises ValueError where one is missing or has another shape.
    """
    encoder = _Encoder(program, matrices, weights)
    config = HrExecutorConfig(vocab_size=program.vocab_size, logits=encoder.operand(program.logits))
    ops = [encoder.op(op) for op in program.ops]  # before the arrays below: it fills them
    arrays: list[Any] = []
    for name, struct in _ARRAYS.items():
        items = ops if name == "ops" else getattr(encoder, name)
        array = (struct * len(items))(*items)
        setattr(config, name, ctypes.cast(array, POINTER(struct)))
        setattr(config, f"num_{name}", len(items))
        arrays.append(array)
    return Encoded(config, (arrays, encoder.keep), tuple(int(op.kind) for op in ops))


class _Encoder:
    """Gives every name its index."""

    def __init__(
        self, program: NativeProgram, matrices: Mapping[str, MatrixStruct], weights: Mapping[str, Weight]
    ) -> None:
        self.keep: list[npt.NDArray[np.float32]] = []
        self._weights = weights
        self._shapes = {spec.name: spec.shape for spec in program.vectors}
        buffers: list[Buffer | QuantBuffer] = [*program.buffers, *program.quant_buffers]
        self._buffer_index = {buffer.name: i for i, buffer in enumerate(buffers)}
        self.buffers = [HrBuffer(b.rows == "logits", getattr(b, "bits", 0), b.width) for b in buffers]
        self.operands = [HrOperand(i, 0, buffer.width) for i, buffer in enumerate(buffers)]
        self._operand_index = dict(self._buffer_index)
        for view in program.views:
            self._operand_index[view.name] = len(self.operands)
            self.operands.append(HrOperand(self._buffer_index[view.buffer], view.column, view.width))
        specs = pack_specs(program)
        missing = [spec.name for spec in specs if spec.name not in matrices]
        if missing:
            raise ValueError(f"weight {missing[0]}: it is not packed")
        self._matrix_index = {spec.name: i for i, spec in enumerate(specs)}
        self.matrices = [matrices[spec.name] for spec in specs]
        self.vectors: list[HrVector] = []
        self._vector_index: dict[tuple[str, ...], int] = {}
        self.ropes: list[HrRope] = []
        self._rope_index: dict[tuple[tuple[float, ...], float], int] = {}
        self.layers = [HrKvShape(layer.num_kv_heads, layer.head_dim) for layer in program.kv]

    def operand(self, name: str | None) -> int:
        return NONE if name is None else self._operand_index[name]

    def _vector(self, names: tuple[str, ...]) -> int:
        """Vectors one after the other as one; () is none."""
        if not names:
            return NONE
        if names not in self._vector_index:
            parts = [_vector(self._weights, name, self._shapes[name]) for name in names]
            data = np.concatenate(parts)
            self.keep.append(data)
            self._vector_index[names] = len(self.vectors)
            self.vectors.append(HrVector(data.ctypes.data, data.size))
        return self._vector_index[names]

    def _rope(self, op: RopeKv) -> int:
        if not op.inv_freq:
            return NONE
        key = (op.inv_freq, op.attention_factor)
        if key not in self._rope_index:
            data = np.array(op.inv_freq, np.float32)
            self.keep.append(data)
            self._rope_index[key] = len(self.ropes)
            self.ropes.append(HrRope(data.ctypes.data, data.size, op.attention_factor))
        return self._rope_index[key]

    def op(self, op: NativeOp) -> HrOp:
        """Raises ValueError where it refers to a vector of another shape."""
        if isinstance(op, Embed):
            return _op(EMBED, out=self.operand(op.out), matrix=self._matrix_index[op.table], scale=op.scale)
        if isinstance(op, Quantize):
            return _op(QUANTIZE, a=self.operand(op.x), quantized=self.operand(op.out))
        if isinstance(op, MatMul):
            return _op(
                LINEAR,
                a=self.operand(op.x),
                out=self.operand(op.out),
                quantized=self.operand(op.quantized),
                matrix=self._matrix_index[op.matrix],
                vector=self._vector(op.bias),
                epilogue=_EPILOGUES[op.epilogue],
            )
        if isinstance(op, Norm):
            return _op(
                NORM,
                a=self.operand(op.x),
                out=self.operand(op.out),
                quantized=self.operand(op.quantized),
                vector=self._vector((op.weight,)),
                eps=op.eps,
                group=op.group,
                selects_rows=int(op.selects_rows),
            )
        if isinstance(op, RopeKv):
            return _op(
                ROPE_KV,
                a=self.operand(op.q),
                b=self.operand(op.k),
                c=self.operand(op.v),
                vector=self._vector((op.q_norm,) if op.q_norm else ()),
                vector2=self._vector((op.k_norm,) if op.k_norm else ()),
                eps=op.eps,
                rope=self._rope(op),
                layer=op.layer,
                group=op.head_dim,
            )
        if isinstance(op, Attention):
            return _op(
                ATTENTION,
                a=self.operand(op.q),
                out=self.operand(op.out),
                quantized=self.operand(op.quantized),
                layer=op.layer,
                num_heads=op.num_heads,
                window=op.window,
                scale=op.scale,
                soft_cap=op.soft_cap,
            )
        return self._elementwise(op)

    def _elementwise(self, op: Add | GatedActivation | SelectRows | SoftCap) -> HrOp:
        if isinstance(op, Add):
            return _op(ADD, a=self.operand(op.a), b=self.operand(op.b), out=self.operand(op.out))
        if isinstance(op, GatedActivation):
            kind = SILU_GATE if op.kind == "silu" else GELU_GATE
            return _op(kind, a=self.operand(op.gate), b=self.operand(op.up), out=self.operand(op.out))
        if isinstance(op, SelectRows):
            return _op(SELECT, a=self.operand(op.x), out=self.operand(op.out))
        return _op(SOFT_CAP, a=self.operand(op.x), soft_cap=op.cap)


def _op(kind: int, **fields: float) -> HrOp:
    return HrOp(kind=kind, **{**dict.fromkeys(_OP_INDICES, NONE), **fields})


def _vector(weights: Mapping[str, Weight], name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    weight = weights.get(name)
    if weight is None or isinstance(weight, QuantTensor) or weight.shape != shape:
        raise ValueError(f"weight {name}: want {shape}, have {None if weight is None else weight.shape}")
    return np.ascontiguousarray(weight, np.float32)
