"""Races between the program instances of one launch. Called by sanitizer.py, and by ../ttsem_order.py on ttsem's log.

Two accesses of one element by two program instances race if one is a plain store, or one is atomic and the other not,
and nothing orders them. What orders them: an atomic that releases, then one of the same address that acquires (the
"last program to arrive adds up" pattern). A release covers the plain accesses of other threads of its own program only
up to the last `tl.debug_barrier()` before it: Triton lets one thread do a scalar atomic and puts no barrier before it.

Kept for each element of what is written: the last operations that stored, loaded and changed it (as FastTrack does:
Flanagan and Freund, PLDI 2009), and for each program instance a vector clock. Stores that two instances agree on are
races too: none of our kernels needs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_PENDING_LIMIT = 1 << 22  # loads kept until a storage is first written, in elements


class Race(Exception):
    """Two accesses that nothing orders: (kind, line, program) of the earlier and of the later one."""

    def __init__(self, earlier: tuple[str, str, object], later: tuple[str, str, object]) -> None:
        self.earlier, self.later = earlier, later
        (kind, line, program), (kind2, line2, program2) = earlier, later
        super().__init__(
            f"{kind} at {line} by program {program} and {kind2} at {line2} by program {program2} touch the same "
            "element, and nothing orders them"
        )


@dataclass
class Storage:
    """Bytes [low, high) that arguments share. Elements of `unit` bytes; arrays are made at the first store."""

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


@dataclass(frozen=True)
class _Seen:
    """What one program instance knows of another: plain accesses up to `plain`, atomics up to `atomic`."""

    plain: int = -1
    atomic: int = -1


_Clock = dict[int, _Seen]  # by program number


class Races:
    """The accesses of one launch, program after program in any order. Raises Race."""

    def __init__(self) -> None:
        self._programs: list[object] = []
        self._owners = np.empty(1024, dtype=np.int32)  # program number of each operation
        self._lines: list[str] = []
        self._clock: _Clock = {}
        self._last_barrier = -1
        self._published: dict[int, _Clock] = {}  # by address of an atomic

    def start_program(self, program: object) -> None:
        self._programs.append(program)
        self._clock, self._last_barrier = {}, -1

    def barrier(self) -> None:
        self._last_barrier = len(self._lines) - 1

    def load(self, storage: Storage, addresses: np.ndarray, itemsize: int, line: str) -> None:
        indices, op = storage.elements(addresses, itemsize), self._new_op(line)
        if storage.arrays:
            self._forbid(storage, indices, ("store", "atomic"), "load", line)
            self._remember_load(storage, indices, op)
            return
        storage.pending.append((op, indices))
        storage.num_pending += indices.size
        if storage.num_pending > _PENDING_LIMIT:
            self._allocate(storage)

    def store(self, storage: Storage, addresses: np.ndarray, itemsize: int, line: str) -> None:
        self._write(storage, addresses, itemsize, "store", ("store", "load", "load2", "atomic"), line)

    def atomic(
        self, storage: Storage, addresses: np.ndarray, itemsize: int, line: str, *, acquires: bool, releases: bool
    ) -> None:
        is_flag = addresses.size == 1  # a tile of atomic adds orders nothing
        address = int(addresses[0])
        if is_flag and acquires:
            _merge(self._clock, self._published.get(address, {}))
        op = self._write(storage, addresses, itemsize, "atomic", ("store", "load", "load2"), line)
        if is_flag and releases:
            published = self._published.setdefault(address, {})
            _merge(published, self._clock)
            _merge(published, {len(self._programs) - 1: _Seen(self._last_barrier, op)})

    def _new_op(self, line: str) -> int:
        op = len(self._lines)
        if op == self._owners.size:
            self._owners = np.concatenate([self._owners, np.empty_like(self._owners)])
        self._owners[op] = len(self._programs) - 1
        self._lines.append(line)
        return op

    def _write(
        self, storage: Storage, addresses: np.ndarray, itemsize: int, kind: str, against: Sequence[str], line: str
    ) -> int:
        indices = storage.elements(addresses, itemsize)
        if not storage.arrays:
            self._allocate(storage)
        self._forbid(storage, indices, against, kind, line)
        op = self._new_op(line)
        storage.arrays[kind][indices] = op
        return op

    def _allocate(self, storage: Storage) -> None:
        storage.allocate()
        for op, indices in storage.pending:
            self._remember_load(storage, indices, op)
        storage.pending = []

    def _remember_load(self, storage: Storage, indices: np.ndarray, op: int) -> None:
        """Keeps the last load, and beside it the last one of another program instance."""
        last = storage.arrays["load"][indices]
        other = (last >= 0) & (self._owners[last] != self._owners[op])
        storage.arrays["load2"][indices[other]] = last[other]
        storage.arrays["load"][indices] = op

    def _forbid(self, storage: Storage, indices: np.ndarray, kinds: Sequence[str], kind: str, line: str) -> None:
        running = len(self._programs) - 1
        for earlier_kind in kinds:
            for earlier in np.unique(storage.arrays[earlier_kind][indices]).tolist():
                if earlier < 0 or (owner := int(self._owners[earlier])) == running:
                    continue
                seen = self._clock.get(owner, _Seen())
                if earlier > (seen.atomic if earlier_kind == "atomic" else seen.plain):
                    raise Race(
                        (earlier_kind.rstrip("2"), self._lines[earlier], self._programs[owner]),
                        (kind, line, self._programs[running]),
                    )


def _merge(into: _Clock, other: _Clock) -> None:
    for program, seen in other.items():
        mine = into.get(program, _Seen())
        into[program] = _Seen(max(mine.plain, seen.plain), max(mine.atomic, seen.atomic))
