"""Judges every memory access of a kernel in the interpreter. Called by memory.py and launch.py; read by tests.

Always on: an active lane outside the tensor that its pointer was derived from raises MemoryFault; so does a race, that
is, two program instances touching the same element, one of them with a plain store, with nothing between them that
orders them. An atomic that releases after one that acquires the same address orders (the "last program to arrive adds
up" pattern). Inside `with traffic() as counts`, bytes requested, bytes of 32-byte sectors and unique bytes are counted
per kernel and argument.

The race check keeps, for each element of a tensor that is written, the last operations that wrote, read and changed it
(as FastTrack does: Flanagan and Freund, PLDI 2009), and a vector clock for each program instance.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType

import numpy as np
import torch
import triton

_TRITON = os.path.dirname(triton.__file__)
_TAG_SHIFT = np.uint64(48)
_ADDRESS = np.uint64((1 << 48) - 1)
_SECTOR_SHIFT = np.uint64(5)  # a GPU moves sectors of 32 bytes
_PENDING_LIMIT = 1 << 22  # loads kept before a tensor is first written, in elements


class MemoryFault(Exception):
    """Out of bounds, a race, or two lanes of one store that disagree. The message names kernel, line and argument."""


@dataclass
class Traffic:
    """Bytes moved through one argument of one kernel, summed over launches; `unique` counts a launch's bytes once."""

    requested: int = 0
    sectors: int = 0
    unique: int = 0

    @property
    def amplification(self) -> float:
        return self.requested / max(1, self.unique)

    @property
    def sector_efficiency(self) -> float:
        return self.requested / max(1, self.sectors)


Counts = dict[tuple[str, str, str], Traffic]  # by kernel, argument, "load" or "store" or "atomic"
_counts: Counts | None = None
_extra: list[tuple[str, torch.Tensor]] = []
_current: Launch | None = None


@contextlib.contextmanager
def traffic() -> Iterator[Counts]:
    """Count bytes per (kernel, argument, kind) inside the block."""
    global _counts
    before, _counts = _counts, {}
    try:
        yield _counts
    finally:
        _counts = before


@contextlib.contextmanager
def also(tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[None]:
    """Allow access to tensors whose addresses a kernel reads from memory (tables of pointers)."""
    _extra.extend(tensors)
    try:
        yield
    finally:
        del _extra[len(_extra) - len(tensors) :]


@contextlib.contextmanager
def launch(kernel: str, tensors: Sequence[tuple[str, torch.Tensor]]) -> Iterator[Launch]:
    """The extent of one kernel launch."""
    global _current
    assert _current is None, "a kernel cannot launch another one"
    _current = Launch(kernel, tensors)
    try:
        yield _current
        _current.count_unique()
    finally:
        _current = None


def current() -> Launch:
    assert _current is not None, "memory was accessed outside a launch"
    return _current


@dataclass(frozen=True)
class _Argument:
    name: str
    low: int
    high: int  # one past the tensor's last byte, from its shape and strides, not from its storage
    storage: int


@dataclass
class _Clock:
    """What one program instance has seen of another: plain accesses up to `plain`, atomics up to `atomic`."""

    plain: int = -1
    atomic: int = -1


@dataclass
class _Shadow:
    """Last operations on each element of one storage; -1: none. Allocated when the storage is first written."""

    low: int
    high: int
    unit: int
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    pending: list[tuple[int, np.ndarray]] = field(default_factory=list)
    num_pending: int = 0

    def allocate(self) -> None:
        size = -(-(self.high - self.low) // self.unit)
        self.arrays = {kind: np.full(size, -1, dtype=np.int32) for kind in ("store", "load", "load2", "atomic")}

    def elements(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """Element numbers; an access narrower than the unit splits every element."""
        if itemsize < self.unit:
            factor = self.unit // itemsize
            self.arrays = {kind: np.repeat(array, factor) for kind, array in self.arrays.items()}
            self.pending = [
                (op, (indices[:, None] * factor + np.arange(factor)).reshape(-1)) for op, indices in self.pending
            ]
            self.unit = itemsize
        first = (addresses - np.uint64(self.low)).astype(np.int64) // self.unit
        if itemsize == self.unit:
            return first
        return (first[:, None] + np.arange(itemsize // self.unit)).reshape(-1)


class Launch:
    """State of one launch: bounds of its arguments, shadows of their storages, clocks of its program instances."""

    def __init__(self, kernel: str, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.kernel = kernel
        self._arguments = [_extent(name, tensor) for name, tensor in tensors]
        self._others = [_extent(name, tensor) for name, tensor in _extra]
        self._shadows: dict[int, _Shadow] = {}
        for argument, (_, tensor) in zip(self._arguments + self._others, [*tensors, *_extra], strict=True):
            shadow = self._shadows.setdefault(
                argument.storage, _Shadow(argument.low, argument.high, tensor.element_size())
            )
            shadow.low, shadow.high = min(shadow.low, argument.low), max(shadow.high, argument.high)
            shadow.unit = min(shadow.unit, tensor.element_size())
        self._touched: dict[tuple[str, str], np.ndarray] = {}
        self._program = (0, 0, 0)
        self._number = -1  # of the running program instance
        self._owners = np.empty(1024, dtype=np.int32)  # program number of each operation
        self._num_ops = 0
        self._lines: list[str] = []
        self._names: list[tuple[int, int, int]] = []
        self._clock: dict[int, _Clock] = {}
        self._last_barrier = -1
        self._published: dict[int, dict[int, _Clock]] = {}  # by address of an atomic

    # ---- called by launch.py and memory.py

    def start_program(self, program: tuple[int, int, int]) -> None:
        self._program, self._clock, self._last_barrier = program, {}, -1
        self._number += 1
        self._names.append(program)

    def barrier(self) -> None:
        self._last_barrier = self._num_ops - 1

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        for argument, part in self._judge(addresses, itemsize, "load"):
            shadow = self._shadows[argument.storage]
            indices, op = shadow.elements(part, itemsize), self._new_op()
            if not shadow.arrays:
                shadow.pending.append((op, indices))
                shadow.num_pending += indices.size
                if shadow.num_pending > _PENDING_LIMIT:
                    self._allocate(shadow)
                continue
            self._forbid(shadow, indices, ("store", "atomic"), "load", argument)
            self._remember_load(shadow, indices, op)

    def store(self, addresses: np.ndarray, itemsize: int, values: np.ndarray) -> None:
        for argument, part in self._judge(addresses, itemsize, "store"):
            if part.size == addresses.size:
                self._forbid_disagreement(part, values, argument)
            self._write(argument, part, itemsize, "store", ("store", "load", "load2", "atomic"))

    def atomic(self, addresses: np.ndarray, itemsize: int, *, acquires: bool, releases: bool) -> None:
        for argument, part in self._judge(addresses, itemsize, "atomic"):
            synchronises = part.size == 1
            if synchronises and acquires:
                _merge(self._clock, self._published.get(int(part[0]), {}))
            op = self._write(argument, part, itemsize, "atomic", ("store", "load", "load2"))
            if synchronises and releases:
                published = self._published.setdefault(int(part[0]), {})
                _merge(published, self._clock)
                _merge(published, {self._number: _Clock(self._last_barrier, op)})

    def count_unique(self) -> None:
        if _counts is None:
            return
        for (name, kind), touched in self._touched.items():
            _counts[self.kernel, name, kind].unique += int(touched.sum())

    # ---- bounds and bytes

    def _judge(self, addresses: np.ndarray, itemsize: int, kind: str) -> Iterator[tuple[_Argument, np.ndarray]]:
        """Addresses without their tags, grouped by argument; raises MemoryFault where one is out of bounds."""
        if addresses.size == 0:
            return
        tags = addresses >> _TAG_SHIFT
        plain = addresses & _ADDRESS
        for tag in [int(tags.flat[0])] if bool((tags == tags.flat[0]).all()) else np.unique(tags).tolist():
            part = plain if tags.size == 1 or bool((tags == tag).all()) else plain[tags == tag]
            if tag == 0:
                yield from self._find(part, itemsize, kind)
                continue
            argument = self._arguments[tag - 1]
            if int(part.min()) < argument.low or int(part.max()) + itemsize > argument.high:
                raise MemoryFault(self._describe(part, itemsize, kind, argument))
            self._count(argument, part, itemsize, kind)
            yield argument, part

    def _find(self, part: np.ndarray, itemsize: int, kind: str) -> Iterator[tuple[_Argument, np.ndarray]]:
        """Pointers that were read from memory: they belong to whichever tensor holds them."""
        left = np.ones(part.shape, dtype=bool)
        for argument in self._arguments + self._others:
            inside = left & (part >= np.uint64(argument.low)) & (part + np.uint64(itemsize) <= np.uint64(argument.high))
            if inside.any():
                left &= ~inside
                self._count(argument, part[inside], itemsize, kind)
                yield argument, part[inside]
        if left.any():
            address = int(part[left][0])
            raise MemoryFault(
                f"{self.kernel}, program {self._program}: {kind} at {_line()} through a pointer from memory "
                f"({address:#x}) lands in no tensor of this launch, nor in one named by sanitizer.also()"
            )

    def _describe(self, part: np.ndarray, itemsize: int, kind: str, argument: _Argument) -> str:
        below, above = part < np.uint64(argument.low), part + np.uint64(itemsize) > np.uint64(argument.high)
        worst = int(part[below].min()) - argument.low if below.any() else int(part.max()) - argument.high
        where = f"{-worst} bytes before the start" if below.any() else f"{worst + itemsize} bytes past the end"
        return (
            f"{self.kernel}, program {self._program}: {kind} at {_line()} is out of bounds in "
            f"{int((below | above).sum())} of {part.size} lanes: up to {where} of `{argument.name}` "
            f"({argument.high - argument.low} bytes)"
        )

    def _count(self, argument: _Argument, part: np.ndarray, itemsize: int, kind: str) -> None:
        if _counts is None:
            return
        entry = _counts.setdefault((self.kernel, argument.name, kind), Traffic())
        entry.requested += part.size * itemsize
        entry.sectors += 32 * int(np.unique(part >> _SECTOR_SHIFT).size)
        touched = self._touched.setdefault((argument.name, kind), np.zeros(argument.high - argument.low, dtype=bool))
        offsets = (part - np.uint64(argument.low)).astype(np.int64)
        for byte in range(itemsize):
            touched[offsets + byte] = True

    # ---- races

    def _new_op(self) -> int:
        if self._num_ops == self._owners.size:
            self._owners = np.concatenate([self._owners, np.empty_like(self._owners)])
        self._owners[self._num_ops] = self._number
        self._lines.append(_line())
        self._num_ops += 1
        return self._num_ops - 1

    def _write(self, argument: _Argument, part: np.ndarray, itemsize: int, kind: str, against: Sequence[str]) -> int:
        shadow = self._shadows[argument.storage]
        indices = shadow.elements(part, itemsize)
        if not shadow.arrays:
            self._allocate(shadow)
        self._forbid(shadow, indices, against, kind, argument)
        op = self._new_op()
        shadow.arrays[kind][indices] = op
        return op

    def _allocate(self, shadow: _Shadow) -> None:
        shadow.allocate()
        for op, indices in shadow.pending:
            self._remember_load(shadow, indices, op)
        shadow.pending = []

    def _remember_load(self, shadow: _Shadow, indices: np.ndarray, op: int) -> None:
        """Keeps the last load, and beside it the last one of another program instance."""
        last = shadow.arrays["load"][indices]
        other = (last >= 0) & (self._owners[last] != self._owners[op])
        shadow.arrays["load2"][indices[other]] = last[other]
        shadow.arrays["load"][indices] = op

    def _forbid(
        self, shadow: _Shadow, indices: np.ndarray, kinds: Sequence[str], kind: str, argument: _Argument
    ) -> None:
        for earlier_kind in kinds:
            for earlier in np.unique(shadow.arrays[earlier_kind][indices]).tolist():
                if earlier < 0 or (owner := int(self._owners[earlier])) == self._number:
                    continue
                seen = self._clock.get(owner, _Clock())
                if earlier <= (seen.atomic if earlier_kind == "atomic" else seen.plain):
                    continue
                raise MemoryFault(
                    f"{self.kernel}: race on `{argument.name}`: {earlier_kind.rstrip('2')} at {self._lines[earlier]} "
                    f"by program {self._names[owner]} and {kind} at {_line()} by program "
                    f"{self._program} touch the same element, and nothing orders them"
                )

    def _forbid_disagreement(self, addresses: np.ndarray, values: np.ndarray, argument: _Argument) -> None:
        """Two active lanes of one store may share an address only where they write the same bits."""
        order = np.argsort(addresses, kind="stable")
        same = addresses[order][1:] == addresses[order][:-1]
        if not same.any():
            return
        bits = np.ascontiguousarray(values).view(np.uint8).reshape(values.size, -1)[order]
        if bool((same & (bits[1:] != bits[:-1]).any(axis=1)).any()):
            raise MemoryFault(
                f"{self.kernel}, program {self._program}: two lanes of the store at {_line()} write different values "
                f"to the same element of `{argument.name}`"
            )


def _merge(into: dict[int, _Clock], other: dict[int, _Clock]) -> None:
    for program, clock in other.items():
        mine = into.get(program, _Clock())
        into[program] = _Clock(max(mine.plain, clock.plain), max(mine.atomic, clock.atomic))


def _extent(name: str, tensor: torch.Tensor) -> _Argument:
    low = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    high = low + (last + 1) * tensor.element_size() if tensor.numel() else low
    return _Argument(name, low, high, tensor.untyped_storage().data_ptr())


def _line() -> str:
    """File and line of the kernel statement that is being interpreted: stock's rewriter marks a kernel's module."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if "_gpu_range" in frame.f_globals and not path.startswith(_TRITON):
            return f"{os.path.basename(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
