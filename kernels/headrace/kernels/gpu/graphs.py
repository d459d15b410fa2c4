"""CUDA graphs of decode steps: for a ladder of batch sizes, one launch instead of hundreds. Owned by `executor.py`.

A graph reads and writes the same addresses at every replay, which the static buffers of `step.py` and `staging.py` are;
what varies (tokens, tables, lengths) is read on the device. A batch between two sizes is padded to the larger one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch


class DecodeGraphs:
    """Captured steps by their number of sequences; captured largest first, they share one pool of memory."""

    def __init__(self) -> None:
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._sizes: list[int] = []
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def size_for(self, num_seqs: int) -> int | None:
        """The smallest captured size that is enough; None where there is none."""
        index = bisect_left(self._sizes, num_seqs)
        return self._sizes[index] if index < len(self._sizes) else None

    def capture(self, size: int, run: Callable[[], None]) -> None:
        """Run once, so that kernels are compiled and loaded, which a capture must not do; then capture."""
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = graph.pool()
        self._graphs[size] = graph
        self._sizes = sorted(self._graphs)

    def replay(self, size: int) -> None:
        """Queue a captured step."""
        self._graphs[size].replay()
