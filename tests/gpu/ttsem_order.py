"""Teaches ttsem 0.1.0 what a release and an acquire order. Installed by conftest.py where tests run under ttsem.

ttsem runs program instances one after the other and calls every element that two of them touch a race; an atomic that
hands the others' partial sums to the last program to arrive is nothing to it. What it finds is judged again here by
interpreter/races.py, from ttsem's own log of accesses; only what a release and an acquire order is taken back. Whether
a barrier precedes the release is judged by our interpreter, on the same tests: ttsem's log has no barriers.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import numpy as np

from tests.gpu.interpreter.races import Race, Races, Storage

# MLIR's MemSemantic of tt.atomic_rmw and tt.atomic_cas: relaxed 1, acquire 2, release 3, acquire and release 4.
_SEMANTIC = re.compile(r"\bsem = (\d)")


def install() -> bool:
    """True where this process runs under ttsem."""
    pidraces = sys.modules.get("ttsem.pidraces")
    if pidraces is None:
        return False
    find_race: Any = pidraces.find_race  # type: ignore[attr-defined]

    def find_unordered_race(log: Any) -> Any:
        race = find_race(log)
        return race if race is not None and _has_race(log) else None

    pidraces.find_race = find_unordered_race  # type: ignore[attr-defined]
    return True


def _has_race(log: list[Any]) -> bool:
    """log: (program, kind, operation, addresses, bytes per element, values) of each access, as they happened."""
    spans = [(addresses[:, None] + np.arange(size)).reshape(-1) for _, _, _, addresses, size, _ in log]
    known = np.unique(np.concatenate(spans))
    storage = Storage(0, int(known.size), 1)
    races, running = Races(), None
    try:
        for (program, kind, operation, addresses, _, _), span in zip(log, spans, strict=True):
            if program != running:
                races.start_program(program)
                running = program
            where = np.searchsorted(known, span).astype(np.uint64)
            if kind == "a":
                races.barrier()
                found = _SEMANTIC.search(operation)
                semantic = int(found.group(1)) if found else 1
                if addresses.size == 1:
                    where = where[:1]  # a flag is known by its first byte
                races.atomic(storage, where, 1, "", acquires=semantic in (2, 4), releases=semantic in (3, 4))
            elif kind == "r":
                races.load(storage, where, 1, "")
            else:
                races.store(storage, where, 1, "")
    except Race:
        return True
    return False
