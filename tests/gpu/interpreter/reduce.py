"""Reductions and scans of the interpreter, as trees. Installed by tests/gpu/interpreter/__init__.py.

The stock interpreter adds bits for bf16, is a Python loop over elements for every combine function that it does not
know (argmax with NaN, xor in tl.sort, a softmax pair), and sums in an order that follows numpy's memory layout. Here a
combine function is called log2(n) times on whole halves; float32 sums are taken in double and rounded once, so that a
row's sum does not depend on how its tile lies in memory; 16-bit floats are rounded after every addition, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock

from tests.gpu.interpreter.numbers import handle


def _tensor(data: np.ndarray, dtype: Any) -> Any:
    """A tl.tensor of `data`; zero-dimensional data becomes a scalar."""
    if data.ndim:
        return tl.tensor(handle(data, dtype), tl.block_type(dtype, list(data.shape)))
    return tl.tensor(handle(data.reshape(1), dtype), dtype)


def _take(data: np.ndarray, axis: int, what: slice) -> np.ndarray:
    return data[(slice(None),) * axis + (what,)]


def _combine(
    function: Any, left: Sequence[np.ndarray], right: Sequence[np.ndarray], dtypes: Sequence[Any]
) -> list[Any]:
    arguments = [_tensor(data, dtype) for side in (left, right) for data, dtype in zip(side, dtypes, strict=True)]
    result = function.rewrite()(*arguments)
    result = tuple(result) if isinstance(result, (tuple, list, tl.tuple)) else (result,)
    return [
        np.broadcast_to(item.handle.data, data.shape).astype(data.dtype)
        for item, data in zip(result, left, strict=True)
    ]


def _double_sum(arrays: Sequence[np.ndarray], dtypes: Sequence[Any], function: Any) -> bool:
    return function is tl.standard._sum_combine and dtypes[0].scalar == tl.float32


def _reduce(input: Any, axis: Any, combine_fn: Any, keep_dims: Any = False, **_: Any) -> Any:
    inputs = input if isinstance(input, tuple) else (input,)
    dtypes = [item.dtype.scalar for item in inputs]
    arrays = [item.handle.data for item in inputs]
    axis = getattr(axis, "value", axis)
    rank = arrays[0].ndim
    if axis is None:
        arrays, where = [data.reshape(-1) for data in arrays], 0
    else:
        where = axis % rank
    if _double_sum(arrays, dtypes, combine_fn):
        arrays = [np.sum(arrays[0], axis=where, keepdims=True, dtype=np.float64).astype(np.float32)]
    while (length := arrays[0].shape[where]) > 1:
        assert length % 2 == 0, "a dimension of a Triton tensor is a power of two"
        left = [_take(data, where, slice(0, None, 2)) for data in arrays]
        right = [_take(data, where, slice(1, None, 2)) for data in arrays]
        arrays = _combine(combine_fn, left, right, dtypes)
    if getattr(keep_dims, "value", keep_dims):
        arrays = [data.reshape((1,) * rank) if axis is None else data for data in arrays]
    else:
        arrays = [np.squeeze(data, axis=where) for data in arrays]
    results = tuple(_tensor(data, dtype) for data, dtype in zip(arrays, dtypes, strict=True))
    return results if isinstance(input, tuple) else results[0]


def _scan(input: Any, axis: Any, combine_fn: Any, reverse: Any = False, **_: Any) -> Any:
    inputs = input if isinstance(input, tuple) else (input,)
    dtypes = [item.dtype.scalar for item in inputs]
    arrays = [item.handle.data for item in inputs]
    where = getattr(axis, "value", axis) % arrays[0].ndim
    backwards = bool(getattr(reverse, "value", reverse))
    if backwards:
        arrays = [np.flip(data, axis=where) for data in arrays]
    if _double_sum(arrays, dtypes, combine_fn):
        arrays = [np.cumsum(arrays[0], axis=where, dtype=np.float64).astype(np.float32)]
    else:
        arrays = _scan_tree(arrays, where, combine_fn, dtypes)
    if backwards:
        arrays = [np.flip(data, axis=where) for data in arrays]
    results = tuple(_tensor(data, dtype) for data, dtype in zip(arrays, dtypes, strict=True))
    return results if isinstance(input, tuple) else results[0]


def _scan_tree(arrays: list[np.ndarray], axis: int, function: Any, dtypes: Sequence[Any]) -> list[np.ndarray]:
    """Hillis and Steele: after step s every element holds the combination of the 2^s elements up to it."""
    step, length = 1, arrays[0].shape[axis]
    place = np.arange(length).reshape([-1 if i == axis else 1 for i in range(arrays[0].ndim)])
    while step < length:
        # Whole tensors, for their lengths must be powers of two: what is rolled in from the end is not kept.
        left = [np.roll(data, step, axis=axis) for data in arrays]
        combined = _combine(function, left, arrays, dtypes)
        arrays = [np.where(place >= step, new, old) for new, old in zip(combined, arrays, strict=True)]
        step *= 2
    return arrays


def install() -> None:
    """Replaces what `_patch_lang` puts into triton.language; launch.py patches it afterwards, once and for all."""

    def patch(scope: Any) -> None:
        for module in (tl, tl.core):
            scope.set_attr(module, "reduce", _reduce)
            scope.set_attr(module, "associative_scan", _scan)

    stock._patch_reduce_scan = patch
