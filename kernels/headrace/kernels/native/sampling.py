"""Rows of sampling parameters and of results between Python and the native library, as arrays of C structs.

Called by the native executor once per step: `encode` the batch's rows, hand the arrays to C++, `decode` the results.
The structs are HrRowSampling and HrRowResult of kernels/csrc/headrace_native.h. `sample` runs the op alone.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from headrace.kernels.batch import F32, I32, RowResult, RowSampling
from headrace.kernels.native.library import last_error, load

_DOUBLES = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_INTEGERS = ("target", "top_k", "position", "num_logprobs")
# Offsets into the arrays of `SamplingArrays`, and counts.
_PARTS = (
    *("bias_ids", "bias_values", "num_bias", "banned_ids", "num_banned"),
    *("prompt_ids", "num_prompt", "output_ids", "num_output", "top"),
)

ROW_SAMPLING = np.dtype(
    [*((name, "<f8") for name in _DOUBLES), ("seed", "<u8"), *((name, "<i4") for name in _INTEGERS + _PARTS)]
)
ROW_RESULT = np.dtype(
    [("logprob", "<f8"), ("token_id", "<i4"), ("is_finite", "<i4"), ("num_top", "<i4"), ("top", "<i4")]
)
_PACK_ROW = struct.Struct("<6dQ14i").pack_into
_NO_PARTS = (0,) * 9


@dataclass(frozen=True, eq=False)
class SamplingArrays:
    """What the C function reads, and where it writes. The offsets in `rows` point into the other arrays.

    rows: ROW_SAMPLING [S]. token_ids: int32, bias_values: float32, of all rows, one row's after another's.
    results: ROW_RESULT [S]. top_ids: int32, top_logprobs: float64, as long as all rows together may need.
    """

    rows: npt.NDArray[np.void]
    token_ids: I32
    bias_values: npt.NDArray[np.float32]
    results: npt.NDArray[np.void]
    top_ids: I32
    top_logprobs: npt.NDArray[np.float64]


def encode(rows: Sequence[RowSampling], vocab_size: int) -> SamplingArrays:
    """The rows as arrays. Token ids are not checked here but by the C function hr_check_samplings."""
    packed = bytearray(ROW_SAMPLING.itemsize * len(rows))
    token_ids: list[int] = []
    bias_values: list[float] = []
    num_top = 0
    for i, row in enumerate(rows):
        plain = not (row.logit_bias or row.banned or row.output_ids or row.prompt_ids)
        parts = _NO_PARTS if plain else _parts(row, token_ids, bias_values)
        _PACK_ROW(
            packed,
            i * ROW_SAMPLING.itemsize,
            row.temperature,
            row.top_p,
            row.min_p,
            row.repetition_penalty,
            row.presence_penalty,
            row.frequency_penalty,
            row.seed,
            row.target,
            row.top_k,
            row.position,
            row.num_logprobs,
            *parts,
            num_top,
        )
        if row.num_logprobs > 0:
            num_top += min(row.num_logprobs, vocab_size)
    return SamplingArrays(
        np.frombuffer(packed, ROW_SAMPLING),
        np.frombuffer(struct.pack(f"<{len(token_ids)}i", *token_ids), "<i4"),  # a quarter of the time of np.array
        np.array(bias_values, np.float32),
        np.empty(len(rows), ROW_RESULT),
        np.empty(num_top, np.int32),
        np.empty(num_top, np.float64),
    )


def decode(arrays: SamplingArrays) -> list[RowResult]:
    """The results that C++ has written."""
    if not len(arrays.top_ids):
        return [
            RowResult(token_id, logprob, (), bool(is_finite))
            for logprob, token_id, is_finite, _, _ in arrays.results.tolist()
        ]
    ids, logprobs = arrays.top_ids.tolist(), arrays.top_logprobs.tolist()
    return [
        RowResult(
            token_id,
            logprob,
            tuple(zip(ids[top : top + num_top], logprobs[top : top + num_top], strict=True)),
            bool(is_finite),
        )
        for logprob, token_id, is_finite, num_top, top in arrays.results.tolist()
    ]


def _parts(row: RowSampling, token_ids: list[int], bias_values: list[float]) -> tuple[int, ...]:
    """Append what a row points to, and return the offsets and counts in the order of _PARTS, without `top`."""
    bias_ids, first_value = len(token_ids), len(bias_values)
    for token_id, bias in row.logit_bias:
        token_ids.append(token_id)
        bias_values.append(bias)
    banned_ids = len(token_ids)
    token_ids += row.banned
    prompt_ids = len(token_ids)
    token_ids += row.prompt_ids
    output_ids = len(token_ids)
    token_ids += row.output_ids
    return (
        bias_ids,
        first_value,
        len(row.logit_bias),
        banned_ids,
        len(row.banned),
        prompt_ids,
        len(row.prompt_ids),
        output_ids,
        len(row.output_ids),
    )


def sample(logits: F32, rows: Sequence[RowSampling], isa: str | None = None) -> list[RowResult]:
    """What `headrace.kernels.sample.sample` does, natively, with the kernels of `isa` (None: those in use).

    logits: float32 [S, V], unchanged. Raises ValueError where a row refers to what is not in the vocabulary, or `isa`
    cannot run here.
    """
    if logits.ndim != 2 or len(logits) != len(rows) or logits.dtype != np.float32 or logits.shape[1] == 0:
        raise ValueError(f"{len(rows)} rows of sampling for logits {logits.dtype} {logits.shape}")
    arrays = encode(rows, logits.shape[1])
    run(np.ascontiguousarray(logits), arrays, isa)
    return decode(arrays)


def run(logits: F32, arrays: SamplingArrays, isa: str | None = None) -> None:
    """Sample encoded rows; `logits` is C-contiguous. Raises ValueError as `sample` does."""
    status = load().hr_sample_test(
        isa.encode() if isa else None,
        _pointer(logits),
        ctypes.c_int64(logits.shape[1]),
        *logits.shape,
        _pointer(arrays.rows),
        _pointer(arrays.token_ids),
        len(arrays.token_ids),
        _pointer(arrays.bias_values),
        len(arrays.bias_values),
        _pointer(arrays.results),
        _pointer(arrays.top_ids),
        _pointer(arrays.top_logprobs),
        len(arrays.top_ids),
    )
    if status < 0:
        raise ValueError(last_error())


def _pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
