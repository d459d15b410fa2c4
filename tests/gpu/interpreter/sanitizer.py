"""Judges every memory access of a kernel in the interpreter. Called by memory.py and launch.py; read by tests.

Always on: MemoryFault for an active lane outside the tensor that its pointer was derived from, for a race between
program instances (races.py), and for two lanes of one store that write different values to one element. Inside
`with traffic() as counts`, bytes requested, bytes of 32-byte sectors and unique bytes are counted per kernel, argument
and kind of access.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import numpy as np
import torch
import triton

from tests.gpu.interpreter.races import Race, Races, Storage

_TRITON = os.path.dirname(triton.__file__)
_TAG_SHIFT = np.uint64(48)
_ADDRESS = np.uint64((1 << 48) - 1)
_SECTOR_SHIFT = np.uint64(5)  # a GPU moves sectors of 32 bytes


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


class Launch:
    """State of one launch: bounds of its arguments, races over their storages, bytes touched."""

    def __init__(self, kernel: str, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        self.kernel = kernel
        self._arguments = [_extent(name, tensor) for name, tensor in tensors]
        self._others = [_extent(name, tensor) for name, tensor in _extra]
        self._storages: dict[int, Storage] = {}
        for argument, (_, tensor) in zip(self._arguments + self._others, [*tensors, *_extra], strict=True):
            size = tensor.element_size()
            storage = self._storages.setdefault(argument.storage, Storage(argument.low, argument.high, size))
            storage.low, storage.high = min(storage.low, argument.low), max(storage.high, argument.high)
            storage.unit = min(storage.unit, size)
        self._races = Races()
        self._touched: dict[tuple[str, str], np.ndarray] = {}
        self._program = (0, 0, 0)

    # ---- called by launch.py and memory.py

    def start_program(self, program: tuple[int, int, int]) -> None:
        self._program = program
        self._races.start_program(program)

    def barrier(self) -> None:
        self._races.barrier()

    def load(self, addresses: np.ndarray, itemsize: int) -> None:
        for argument, part in self._judge(addresses, itemsize, "load"):
            with self._names_the_race(argument):
                self._races.load(self._storages[argument.storage], part, itemsize, _line())

    def store(self, addresses: np.ndarray, itemsize: int, values: np.ndarray) -> None:
        for argument, part in self._judge(addresses, itemsize, "store"):
            if part.size == addresses.size:
                self._forbid_disagreement(part, values, argument)
            with self._names_the_race(argument):
                self._races.store(self._storages[argument.storage], part, itemsize, _line())

    def atomic(self, addresses: np.ndarray, itemsize: int, *, acquires: bool, releases: bool) -> None:
        for argument, part in self._judge(addresses, itemsize, "atomic"):
            storage = self._storages[argument.storage]
            with self._names_the_race(argument):
                self._races.atomic(storage, part, itemsize, _line(), acquires=acquires, releases=releases)

    @contextlib.contextmanager
    def _names_the_race(self, argument: _Argument) -> Iterator[None]:
        try:
            yield
        except Race as race:
            raise MemoryFault(f"{self.kernel}: race on `{argument.name}`: {race}") from None

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
