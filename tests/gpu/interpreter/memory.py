"""Loads, stores and atomics of the interpreter. Installed by tests/gpu/interpreter/__init__.py.

Each takes the argument's number off its pointers (launch.py put it there), lets sanitizer.py judge the access, and only
then touches memory: a wrong kernel raises MemoryFault and never corrupts the process.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock

from tests.gpu.interpreter import sanitizer
from tests.gpu.interpreter.numbers import handle, poison

_ADDRESS = np.uint64((1 << 48) - 1)
_ACQUIRES = (stock._ir.MEM_SEMANTIC.ACQUIRE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (stock._ir.MEM_SEMANTIC.RELEASE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


def _lanes(ptrs: Any, mask: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Tagged addresses of the active lanes, and the mask as an array (None: all are active)."""
    if mask is None:
        return ptrs.data.reshape(-1), None
    flags = mask if isinstance(mask, np.ndarray) else mask.data  # descriptors pass arrays
    flags = np.broadcast_to(flags, ptrs.data.shape).astype(bool, copy=False)
    return ptrs.data[flags], flags


def _itemsize(ptrs: Any) -> int:
    return max(1, int(ptrs.get_element_ty().primitive_bitwidth) // 8)


def _load(self: Any, ptrs: Any, mask: Any, other: Any, cache: Any, eviction: Any, volatile: Any) -> Any:
    dtype = ptrs.get_element_ty()
    active, flags = _lanes(ptrs, mask)
    sanitizer.current().load(active, _itemsize(ptrs))
    if flags is None:
        flags = np.ones(ptrs.data.shape, dtype=bool)
    filler = poison(ptrs.data.shape, dtype) if other is None else other.data
    data = stock._interpreter.load(ptrs.data & _ADDRESS, flags, filler, stock._get_np_dtype(dtype))
    return handle(data, dtype)


def _store(self: Any, ptrs: Any, value: Any, mask: Any, cache: Any, eviction: Any) -> Any:
    active, flags = _lanes(ptrs, mask)
    values = np.broadcast_to(value.data, ptrs.data.shape)
    written = values.reshape(-1) if flags is None else values[flags]
    sanitizer.current().store(active, _itemsize(ptrs), written)
    if flags is None:
        flags = np.ones(ptrs.data.shape, dtype=bool)
    return stock._interpreter.store(ptrs.data & _ADDRESS, value.data, flags)


def _plain_load(self: Any, ptr: Any, cache: Any, eviction: Any, volatile: Any) -> Any:
    return _load(self, ptr, None, None, cache, eviction, volatile)


def _plain_store(self: Any, ptr: Any, value: Any, cache: Any, eviction: Any) -> Any:
    return _store(self, ptr, value, None, cache, eviction)


def _descriptor_load(self: Any, descriptor: Any, indices: Any, cache: Any, eviction: Any) -> Any:
    """TMA: lanes outside of the tensor are zero (the stock load takes a bare mask, and keywords)."""
    ptrs, mask = descriptor.materialize_pointers(indices)
    kind = ptrs.get_element_ty()
    zeros = handle(np.zeros(ptrs.data.shape, dtype=stock._get_np_dtype(kind)), kind)
    return _load(self, ptrs, handle(mask, tl.int1), zeros, cache, eviction, False)


def _untagged(ptrs: Any) -> Any:
    return stock.TensorHandle(ptrs.data & _ADDRESS, ptrs.dtype)


def _atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
    active, _ = _lanes(ptr, mask)
    sanitizer.current().atomic(active, _itemsize(ptr), acquires=sem in _ACQUIRES, releases=sem in _RELEASES)
    return _stock_rmw(self, op, _untagged(ptr), value, mask, sem, scope)


def _atomic_cas(self: Any, ptr: Any, expected: Any, value: Any, sem: Any, scope: Any) -> Any:
    active, _ = _lanes(ptr, None)
    sanitizer.current().atomic(active, _itemsize(ptr), acquires=sem in _ACQUIRES, releases=sem in _RELEASES)
    return _stock_cas(self, _untagged(ptr), expected, value, sem, scope)


def _barrier(self: Any) -> None:
    sanitizer.current().barrier()


_builder = stock.InterpreterBuilder
_stock_rmw, _stock_cas = _builder.create_atomic_rmw, _builder.create_atomic_cas


def install() -> None:
    methods: dict[str, Any] = {
        "create_descriptor_load": _descriptor_load,
        "create_masked_load": _load,
        "create_masked_store": _store,
        "create_load": _plain_load,
        "create_store": _plain_store,
        "create_atomic_rmw": _atomic_rmw,
        "create_atomic_cas": _atomic_cas,
        "create_barrier": _barrier,
    }
    for name, method in methods.items():
        setattr(_builder, name, method)
