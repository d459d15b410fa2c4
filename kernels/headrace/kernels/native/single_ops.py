"""Single native ops that are no matrix product, arrays in and arrays out: for tests and benches.

The native executor runs the same kernels from C++ (kernels/csrc); nothing that serves calls this file. `isa` names a
table of kernels, None means the one in use. Arguments that do not fit raise ValueError before memory is touched.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library

F32 = npt.NDArray[np.float32]
I32 = npt.NDArray[np.int32]
U8 = npt.NDArray[np.uint8]
KvKind = Literal["f32", "f16", "bf16", "int8"]
Bits = Literal[8, 16]
ElementwiseKind = Literal["add", "silu_gate", "gelu_gate", "soft_cap"]

KV_KINDS: tuple[KvKind, ...] = ("f32", "f16", "bf16", "int8")  # KvKind of csrc/layout.h
ELEMENTWISE: tuple[ElementwiseKind, ...] = ("add", "silu_gate", "gelu_gate", "soft_cap")  # HrElementwise
_ALIGNMENT = 64  # bytes; kAlign of csrc/layout.h


class _KvStruct(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("data_bytes", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
        ("num_blocks", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class _RmsNormStruct(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("row_index", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("quantized", ctypes.c_void_p),
        ("quantized_bytes", ctypes.c_int64),
        ("num_x_rows", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("eps", ctypes.c_float),
    )


class _RopeKvStruct(ctypes.Structure):
    _fields_ = (
        ("kv", _KvStruct),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("k_stride", ctypes.c_int64),
        ("v_stride", ctypes.c_int64),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("cos_sin", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_heads", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("norm_eps", ctypes.c_float),
    )


class _AttentionStruct(ctypes.Structure):
    _fields_ = (
        ("kv", _KvStruct),
        ("q", ctypes.c_void_p),
        ("q_stride", ctypes.c_int64),
        ("block_tables", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("cu_seqlens_q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("quantized", ctypes.c_void_p),
        ("quantized_bytes", ctypes.c_int64),
        ("num_seqs", ctypes.c_int32),
        ("block_table_width", ctypes.c_int32),
        ("num_heads", ctypes.c_int32),
        ("window", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("repeats", ctypes.c_int32),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
    )


@dataclass(frozen=True, eq=False)
class KvBlocks:
    """The KV blocks of one layer (csrc/layout.h, KvLayer). data: uint8 [num_blocks, bytes of a block], aligned."""

    kind: KvKind
    num_kv_heads: int
    head_dim: int
    block_size: int
    data: U8

    @classmethod
    def empty(cls, kind: KvKind, num_kv_heads: int, head_dim: int, block_size: int, num_blocks: int) -> KvBlocks:
        """All bytes 255: NaN in every kind (for int8 in its scales), so that reading an unwritten slot shows."""
        size = _library().hr_kv_block_bytes(KV_KINDS.index(kind), num_kv_heads, head_dim, block_size)
        if size < 0:
            raise ValueError(library.last_error())
        data = _aligned(num_blocks * size).reshape(num_blocks, size)
        data[:] = 255
        return cls(kind, num_kv_heads, head_dim, block_size, data)

    def copy(self) -> KvBlocks:
        """The same contents in memory of its own."""
        data = _aligned(self.data.nbytes).reshape(self.data.shape)
        data[:] = self.data
        return KvBlocks(self.kind, self.num_kv_heads, self.head_dim, self.block_size, data)

    def struct(self) -> _KvStruct:
        """HrKv of headrace_native.h."""
        kind = KV_KINDS.index(self.kind)
        num_blocks = self.data.shape[0]
        return _KvStruct(
            self.data.ctypes.data,
            self.data.nbytes,
            kind,
            self.num_kv_heads,
            self.head_dim,
            self.block_size,
            num_blocks,
            0,
        )


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Who attends to what: arrays as in `headrace.kernels.batch.StepBatch`."""

    cu_seqlens_q: I32  # [B + 1]
    seq_lens: I32  # [B]
    block_tables: I32  # [B, most blocks]


@dataclass(frozen=True)
class AttentionOptions:
    """As in `headrace.kernels.program.PagedAttention`; num_threads share the op, repeats times over."""

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    num_threads: int = 1
    repeats: int = 1


@dataclass(frozen=True, eq=False)
class AttentionResult:
    """out: float32 [T, num_heads * head_dim]; quantized: that as activations, where bits were asked for. num_items: how
    many pieces the op was cut into. nanoseconds: int64 [repeats], of each time."""

    out: F32
    quantized: U8 | None
    num_items: int
    nanoseconds: npt.NDArray[np.int64]


def attention(
    q: F32,
    kv: KvBlocks,
    batch: AttentionBatch,
    options: AttentionOptions,
    *,
    bits: Bits | None = None,
    isa: str | None = None,
) -> AttentionResult:
    """`headrace.kernels.program.PagedAttention` on native KV blocks. q: float32 [T, num_heads * head_dim]."""
    q = np.ascontiguousarray(q, np.float32)
    cu_seqlens_q, seq_lens, tables = (
        np.ascontiguousarray(array, np.int32) for array in (batch.cu_seqlens_q, batch.seq_lens, batch.block_tables)
    )
    if len(cu_seqlens_q) != len(seq_lens) + 1 or tables.shape[0] != len(seq_lens) or cu_seqlens_q[-1] != len(q):
        raise ValueError("cu_seqlens_q, seq_lens, block_tables and q are of different batches")
    out = np.full_like(q, np.nan)
    quantized = _activations(len(q), q.shape[1], bits) if bits else None
    nanoseconds = np.zeros(options.repeats, np.int64)
    struct = _AttentionStruct(
        kv.struct(),
        q.ctypes.data,
        q.shape[1],
        tables.ctypes.data,
        seq_lens.ctypes.data,
        cu_seqlens_q.ctypes.data,
        out.ctypes.data,
        q.shape[1],
        _address(quantized),
        0 if quantized is None else quantized.nbytes,
        len(seq_lens),
        tables.shape[1],
        q.shape[1] // kv.head_dim,
        options.window,
        bits or 0,
        options.num_threads,
        options.repeats,
        options.scale,
        options.soft_cap,
    )
    num_items = _library().hr_attention_test(_name(isa), ctypes.byref(struct), _address(nanoseconds))
    if num_items < 0:
        raise ValueError(library.last_error())
    return AttentionResult(out, quantized, num_items, nanoseconds)


def rope_table(
    inv_freq: F32, positions: Sequence[int] | I32, attention_factor: float = 1.0, *, isa: str | None = None
) -> F32:
    """float32 [T, 2 * half]: cos, then sin, of positions[t] * inv_freq[i]."""
    inv_freq = np.ascontiguousarray(inv_freq, np.float32)
    at = np.ascontiguousarray(positions, np.int32)
    out = np.empty((len(at), 2 * len(inv_freq)), np.float32)
    function = _library().hr_rope_table_test
    factor = ctypes.c_float(attention_factor)
    _check(function(_name(isa), _address(inv_freq), len(inv_freq), _address(at), len(at), factor, _address(out)))
    return out


def rope_kv(
    q: F32,
    k: F32,
    v: F32,
    slots: Sequence[int] | I32,
    kv: KvBlocks,
    *,
    cos_sin: F32 | None = None,
    q_norm: F32 | None = None,
    k_norm: F32 | None = None,
    norm_eps: float = 0.0,
    isa: str | None = None,
) -> F32:
    """Norm and turn q and k, write k and v into kv at `slots`. Returns the new q, [T, num_heads * head_dim].

    q_norm, k_norm: float32 [head_dim], RMSNorm per head, or None. cos_sin: of `rope_table`, or None for no rotation.
    """
    q, k, v = (np.array(array, np.float32, order="C") for array in (q, k, v))
    at = np.ascontiguousarray(slots, np.int32)
    if not len(q) == len(k) == len(v) == len(at) or (cos_sin is not None and cos_sin.shape != (len(q), kv.head_dim)):
        raise ValueError("q, k, v, slots and cos_sin are of different batches")
    if any(norm is not None and norm.shape != (kv.head_dim,) for norm in (q_norm, k_norm)):
        raise ValueError("norms have head_dim elements")
    struct = _RopeKvStruct(
        kv.struct(),
        q.ctypes.data,
        k.ctypes.data,
        v.ctypes.data,
        q.shape[1],
        k.shape[1],
        v.shape[1],
        _address(q_norm),
        _address(k_norm),
        _address(cos_sin),
        at.ctypes.data,
        q.shape[1] // kv.head_dim,
        len(q),
        norm_eps,
    )
    _check(_library().hr_rope_kv_test(_name(isa), ctypes.byref(struct)))
    return q


@dataclass(frozen=True, eq=False)
class NormResult:
    """out: float32 [rows, width], None where only activations were wanted; quantized: activations, or None."""

    out: F32 | None
    quantized: U8 | None


def rms_norm(
    x: F32,
    weight: F32,
    eps: float,
    *,
    row_index: Sequence[int] | I32 | None = None,
    bits: Bits | None = None,
    wants_floats: bool = True,
    isa: str | None = None,
) -> NormResult:
    """`headrace.kernels.program.RmsNorm` in groups of len(weight), of rows row_index of x (default: all), as float32
    and, with bits, as quantised activations."""
    x, weight = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(weight, np.float32)
    index = None if row_index is None else np.ascontiguousarray(row_index, np.int32)
    rows = len(x) if index is None else len(index)
    out = np.full((rows, x.shape[1]), np.nan, np.float32) if wants_floats else None
    quantized = _activations(rows, x.shape[1], bits) if bits else None
    struct = _RmsNormStruct(
        x.ctypes.data,
        x.shape[1],
        weight.ctypes.data,
        _address(index),
        _address(out),
        x.shape[1],
        _address(quantized),
        0 if quantized is None else quantized.nbytes,
        len(x),
        rows,
        x.shape[1],
        len(weight),
        bits or 0,
        eps,
    )
    _check(_library().hr_rms_norm_test(_name(isa), ctypes.byref(struct)))
    return NormResult(out, quantized)


def elementwise(
    kind: ElementwiseKind, a: F32, b: F32 | None = None, *, cap: float = 0.0, isa: str | None = None
) -> F32:
    """a + b, silu(a) * b, gelu_tanh(a) * b, or cap * tanh(a / cap). a, b: float32 [rows, width]."""
    a = np.ascontiguousarray(a, np.float32)
    other = None if b is None else np.ascontiguousarray(b, np.float32)
    if other is not None and other.shape != a.shape:
        raise ValueError("a and b are of different shapes")
    out = np.full_like(a, np.nan)
    function = _library().hr_elementwise_test
    arrays = (_address(a), _address(other), _address(out))
    shape = (ctypes.c_int64(a.shape[1]), *a.shape)
    _check(function(_name(isa), ELEMENTWISE.index(kind), *arrays, *shape, ctypes.c_float(cap)))
    return out


def _activations(rows: int, width: int, bits: Bits) -> U8:
    size = _library().hr_activation_bytes(rows, width, bits)
    if size < 0:
        raise ValueError(library.last_error())
    data = _aligned(size)
    data[:] = 0
    return data


def _aligned(size: int) -> U8:
    block = np.empty(size + _ALIGNMENT, np.uint8)
    start = -block.ctypes.data % _ALIGNMENT
    return block[start : start + size]


def _address(array: npt.NDArray[Any] | None) -> ctypes.c_void_p | None:
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _name(isa: str | None) -> bytes | None:
    return None if isa is None else isa.encode()


def _check(code: int) -> None:
    if code < 0:
        raise ValueError(library.last_error())


@cache
def _library() -> ctypes.CDLL:
    native = library.load()
    native.hr_kv_block_bytes.restype = ctypes.c_int64
    native.hr_activation_bytes.restype = ctypes.c_int64
    native.hr_activation_bytes.argtypes = [ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    return native
