"""The native back end: the step program handed to C++ once, one call per step. Imports no torch.

Made by the engine process. Everything that a step needs is allocated when the executor is made; a step only fills in
one C struct, encodes the sampling parameters of its rows, and reads the results.
"""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from headrace.kernels.batch import F32, I32, RowResult, StepBatch
from headrace.kernels.native import library, sampling
from headrace.kernels.native.encode import KIND_NAMES, HrExecutorConfig, encode
from headrace.kernels.native.fuse import fuse
from headrace.kernels.native.matrix import PackedMatrix, pack_matrix
from headrace.kernels.native.ops import ActivationBits, NativeProgram, WeightForm, form_of, pack_specs
from headrace.kernels.program import StepProgram
from headrace.kernels.quant import Weight

KvDtype = Literal["fp32", "fp16", "bf16", "int8"]
KV_DTYPES: tuple[KvDtype, ...] = ("fp32", "fp16", "bf16", "int8")  # KvKind of csrc/layout.h
PROFILE_VARIABLE = "HEADRACE_NATIVE_PROFILE"  # 1: measure every op
_I32 = np.dtype(np.int32)


@runtime_checkable
class PackedWeights(Protocol):
    """Weights that are packed already. forms: of every matrix of the step program, as `fuse` was told when they were
    packed. matrices: by the names of `pack_specs`. vectors: norms and biases."""

    @property
    def forms(self) -> Mapping[str, WeightForm]: ...
    @property
    def matrices(self) -> Mapping[str, PackedMatrix]: ...
    @property
    def vectors(self) -> Mapping[str, Weight]: ...


@dataclass(frozen=True, eq=False)
class WeightsOnTheSpot:
    """Loaded weights, packed now. Implements PackedWeights."""

    forms: Mapping[str, WeightForm]
    matrices: Mapping[str, PackedMatrix]
    vectors: Mapping[str, Weight]


@dataclass(frozen=True)
class OpTime:
    """Time spent in one op of the native program, all steps together. name: what it reads or writes."""

    kind: str
    name: str
    nanoseconds: int


class NativeExecutor:
    """Implements `headrace.kernels.batch.Executor`.

    weights: one per `program.weights`, of that shape, or packed ones; ValueError otherwise. num_blocks, block_size: the
    KV blocks, whose memory is taken from the system when it is first written. num_threads: of this executor's own,
    None: one per usable CPU. activation_bits: precision of the activations that meet quantised weights; the output
    head's have 16. test_fault: see HrExecutorConfig. native_seconds: spent in the steps of C++ so far.
    """

    def __init__(
        self,
        program: StepProgram,
        weights: Mapping[str, Weight] | PackedWeights,
        *,
        num_blocks: int,
        block_size: int,
        num_threads: int | None = None,
        max_num_batched_tokens: int = 512,
        max_logit_rows: int = 256,
        kv_dtype: KvDtype = "fp16",
        activation_bits: ActivationBits = 8,
        test_fault: bool = False,
    ) -> None:
        if isinstance(weights, PackedWeights):
            packed = weights
            native = fuse(program, weights.forms, activation_bits=activation_bits)
        else:
            _check_shapes(program, weights)
            forms = {spec.name: form_of(weights[spec.name]) for spec in program.weights if len(spec.shape) == 2}
            native = fuse(program, forms, activation_bits=activation_bits)
            packed = pack(native, forms, weights)
        self._open(
            native,
            packed,
            num_blocks=num_blocks,
            block_size=block_size,
            kv_kind=KV_DTYPES.index(kv_dtype),
            max_tokens=max_num_batched_tokens,
            max_logit_rows=max_logit_rows,
            num_threads=num_threads or _num_cpus(),
            is_profiled=int(os.environ.get(PROFILE_VARIABLE, "") not in ("", "0")),
            test_fault=int(test_fault),
        )

    @classmethod
    def of_native(
        cls, program: NativeProgram, packed: PackedWeights, *, num_blocks: int, block_size: int, **options: int
    ) -> NativeExecutor:
        """An executor of a native program as it stands, for tests of the rewrites. options: of HrExecutorConfig."""
        executor = cls.__new__(cls)
        defaults = {"kv_kind": 0, "max_tokens": 512, "max_logit_rows": 256, "num_threads": 1}
        executor._open(program, packed, num_blocks=num_blocks, block_size=block_size, **(defaults | options))
        return executor

    def _open(self, program: NativeProgram, packed: PackedWeights, **numbers: int) -> None:
        self._library = _library()
        self._program = program
        structs = {spec.name: packed.matrices[spec.name].struct() for spec in pack_specs(program)}
        encoded = encode(program, structs, packed.vectors)
        for name, number in numbers.items():
            setattr(encoded.config, name, number)
        handle = self._library.hr_executor_create(ctypes.byref(encoded.config))
        if not handle:
            raise ValueError(library.last_error())
        self._handle = ctypes.c_void_p(handle)
        self._close = weakref.finalize(self, self._library.hr_executor_destroy, self._handle)
        self._kinds = encoded.kinds
        self._name = f"native-{self._library.hr_executor_isa(self._handle).decode()}"
        self.native_seconds = 0.0
        self._batch = _StepStruct()
        self._batch_reference = ctypes.byref(self._batch)

    @property
    def name(self) -> str:
        return self._name

    def execute(self, batch: StepBatch) -> list[RowResult]:
        """Run one step; one result per row of batch.logit_rows. Raises ValueError where the batch does not fit; nothing
        has run then."""
        if len(batch.sampling) != len(batch.logit_rows):
            raise ValueError(f"{len(batch.logit_rows)} rows of logits, {len(batch.sampling)} to sample")
        arrays = sampling.encode(batch.sampling, self._program.vocab_size)
        struct = self._batch
        struct.samplings = arrays.rows.ctypes.data
        struct.sampling_ids = _address(arrays.token_ids)
        struct.bias_values = _address(arrays.bias_values)
        struct.results = arrays.results.ctypes.data
        struct.top_ids = _address(arrays.top_ids)
        struct.top_logprobs = _address(arrays.top_logprobs)
        struct.num_sampling_ids = len(arrays.token_ids)
        struct.num_bias_values = len(arrays.bias_values)
        struct.num_top = len(arrays.top_ids)
        self._run(batch)
        return sampling.decode(arrays)

    def forward(self, batch: StepBatch) -> F32:
        """Run the step program alone: the logits, float32 [S, vocab_size], and the batch's keys and values written."""
        self._batch.samplings = None
        self._run(batch)
        logits = np.empty((len(batch.logit_rows), self._program.vocab_size), np.float32)
        self._library.hr_executor_logits(self._handle, logits.ctypes.data)
        return logits

    def times(self) -> list[OpTime]:
        """Of every op so far, then of what precedes the first ("plan") and of sampling; zeros unless profiled."""
        numbers = np.zeros(len(self._kinds) + 2, np.int64)
        if self._library.hr_executor_stats(self._handle, numbers.ctypes.data, len(numbers)):
            raise ValueError(library.last_error())
        names = [(KIND_NAMES[kind], _label(op)) for kind, op in zip(self._kinds, self._program.ops, strict=True)]
        names += [("plan", ""), ("sample", "")]
        return [OpTime(kind, label, n) for (kind, label), n in zip(names, numbers.tolist(), strict=True)]

    def poison(self, block: int) -> None:
        """Fill a KV block with NaN, so that a test sees who reads what was freed."""
        if self._library.hr_executor_poison(self._handle, block):
            raise ValueError(library.last_error())

    def close(self) -> None:
        """Give threads and memory back; the executor cannot be used afterwards. Calling it again changes nothing."""
        self._close()

    def _run(self, batch: StepBatch) -> None:
        if not self._close.alive:
            raise ValueError("the executor is closed")
        struct = self._batch
        num_tokens, num_seqs = len(batch.token_ids), len(batch.seq_lens)
        tables = batch.block_tables
        width = tables.shape[1] if tables.ndim == 2 and len(tables) == num_seqs else 0
        struct.token_ids = _checked(batch.token_ids, num_tokens)
        struct.positions = _checked(batch.positions, num_tokens)
        struct.slot_mapping = _checked(batch.slot_mapping, num_tokens)
        struct.cu_seqlens_q = _checked(batch.cu_seqlens_q, num_seqs + 1)
        struct.seq_lens = _checked(batch.seq_lens, num_seqs)
        struct.block_tables = _checked(tables, num_seqs * width)
        struct.logit_rows = _checked(batch.logit_rows, len(batch.logit_rows))
        struct.num_tokens = num_tokens
        struct.num_seqs = num_seqs
        struct.num_logits = len(batch.logit_rows)
        struct.block_table_width = width
        begin = time.perf_counter()
        failed = self._library.hr_executor_run(self._handle, self._batch_reference)
        self.native_seconds += time.perf_counter() - begin
        if failed:
            raise ValueError(library.last_error())


def pack(program: NativeProgram, forms: Mapping[str, WeightForm], weights: Mapping[str, Weight]) -> PackedWeights:
    """Pack what a native program needs."""
    matrices = {
        spec.name: pack_matrix([weights[source] for source in spec.sources], is_gated=spec.is_gated)
        for spec in pack_specs(program)
    }
    return WeightsOnTheSpot(forms, matrices, {spec.name: weights[spec.name] for spec in program.vectors})


def _check_shapes(program: StepProgram, weights: Mapping[str, Weight]) -> None:
    for spec in program.weights:
        weight = weights.get(spec.name)
        if weight is None or weight.shape != spec.shape:
            raise ValueError(f"weight {spec.name}: want {spec.shape}, have {None if weight is None else weight.shape}")


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _label(op: object) -> str:
    return str(getattr(op, "matrix", None) or getattr(op, "weight", None) or getattr(op, "out", None) or "")


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]  # a third of the time of array.ctypes.data, but for records
    return address


def _checked(array: I32, size: int) -> int:
    """The address of an int32 array of `size` elements, without gaps; the values are checked in C++."""
    if array.dtype != _I32 or array.size != size or not array.flags.c_contiguous:
        raise ValueError(f"want {size} int32 without gaps, have {array.dtype} {array.shape}")
    return _address(array)


class _StepStruct(ctypes.Structure):
    """HrStepBatch of headrace_native.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("token_ids", "positions", "slot_mapping")),
        *((name, ctypes.c_void_p) for name in ("cu_seqlens_q", "seq_lens", "block_tables", "logit_rows")),
        *((name, ctypes.c_void_p) for name in ("samplings", "sampling_ids", "bias_values")),
        *((name, ctypes.c_void_p) for name in ("results", "top_ids", "top_logprobs")),
        *((name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "num_logits", "block_table_width")),
        *((name, ctypes.c_int32) for name in ("num_sampling_ids", "num_bias_values", "num_top", "reserved")),
    )


@cache
def _library() -> ctypes.CDLL:
    """The native library with the prototypes of what is called here."""
    native = library.load()
    pointer = ctypes.c_void_p
    native.hr_executor_create.argtypes = (ctypes.POINTER(HrExecutorConfig),)
    native.hr_executor_create.restype = pointer
    native.hr_executor_destroy.argtypes = (pointer,)
    native.hr_executor_destroy.restype = None
    native.hr_executor_run.argtypes = (pointer, ctypes.POINTER(_StepStruct))
    native.hr_executor_run.restype = ctypes.c_int
    native.hr_executor_logits.argtypes = (pointer, pointer)
    native.hr_executor_logits.restype = ctypes.c_int
    native.hr_executor_stats.argtypes = (pointer, pointer, ctypes.c_int32)
    native.hr_executor_stats.restype = ctypes.c_int
    native.hr_executor_isa.argtypes = (pointer,)
    native.hr_executor_isa.restype = ctypes.c_char_p
    native.hr_executor_poison.argtypes = (pointer, ctypes.c_int32)
    native.hr_executor_poison.restype = ctypes.c_int
    return native
