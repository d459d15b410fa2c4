"""KV blocks of preempted sequences in pinned host memory, and from how many tokens on that is worth it.

Owned by `executor.py`. Everything is queued on the stream that the steps run on: nothing here waits for the device but
`measure`, which runs before the first request. docs/decisions/0008 has the arithmetic.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from headrace.kernels.gpu.cache import LayerCache
from headrace.kernels.kv_blocks.triton import CacheSet, swap_in, swap_out

log = logging.getLogger("headrace.kernels")

NEVER = (1 << 31) - 1  # tokens: no sequence is as long
_STAGING_BYTES = 64 << 20  # on the device, at least one block: a copy of this size runs at the bus's full rate
_MEASURED_BLOCKS = 8
_REPEATS = 3


@dataclass(frozen=True)
class Costs:
    """Seconds, measured. prefill: of a token of a large step; decode: a step of one sequence, which reads all weights
    for one token; swap: copying one block out and back, and `swap_start` once for any number of them."""

    prefill: float
    decode: float
    swap: float
    swap_start: float


def min_swap_tokens(costs: Costs, block_size: int) -> int:
    """From how many tokens on copying KV out and back is quicker than computing it again; NEVER where it is not.

    n tokens cost n * prefill to compute, but the first decode / prefill of them nothing, as they fit beside a step that
    reads all weights anyway; and swap_start + n * swap / block_size to copy.
    """
    saved = costs.prefill - costs.swap / block_size
    if saved <= 0.0:
        return NEVER
    return min(NEVER, max(1, math.ceil((costs.decode + costs.swap_start) / saved)))


def num_host_blocks(num_bytes: int, block_bytes: int) -> int:
    """How many blocks `num_bytes` hold; never more than half of the machine's memory, which others need too."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > machine // 2:
        log.warning("swap space: half of the machine's memory, %.1f GiB, and not more", machine / 2**31)
    return min(num_bytes, machine // 2) // block_bytes


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The shortest of a few runs, each alone on the device; the first one, which may compile, is not counted."""
    times = []
    for _ in range(1 + _REPEATS):
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


class HostBlocks:
    """A pool of `num_blocks` host blocks for the caches of one model.

    Raises ValueError where the caches are not alike, RuntimeError where so much memory cannot be pinned.
    """

    def __init__(self, caches: Sequence[LayerCache], num_blocks: int) -> None:
        self._caches = CacheSet.of([tensor for layer in caches for tensor in (layer.k, layer.v)])
        self._device = self._caches.base.device
        self.num_blocks = num_blocks
        row = (self._caches.offsets.shape[0], 4 * self._caches.block_words)
        num_staged = min(num_blocks, max(1, _STAGING_BYTES // self._caches.block_bytes))
        # Torch's allocator of pinned memory takes the next power of two.
        self._host = torch.empty((num_blocks, *row), dtype=torch.uint8, pin_memory=self._is_cuda)
        self._staging = torch.empty((num_staged, *row), dtype=torch.uint8, device=self._device)

    @property
    def num_bytes(self) -> int:
        """Of host memory."""
        return self._host.numel()

    def swap_out(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """As `headrace.kernels.batch.SwappingExecutor`."""
        swap_out(self._caches, self._numbers(blocks), self._staging, self._host, host_blocks)

    def swap_in(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """As `headrace.kernels.batch.SwappingExecutor`."""
        swap_in(self._caches, self._numbers(blocks), self._staging, self._host, host_blocks)

    def costs(self, prefill: float, decode: float) -> Costs:
        """Measured by copying the first blocks out and back; they stay what they are. prefill, decode: as in Costs."""
        count = min(_MEASURED_BLOCKS, self.num_blocks, self._caches.num_blocks)
        one, many = self._there_and_back(1), self._there_and_back(count)
        each = (many - one) / (count - 1) if count > 1 else one
        return Costs(prefill, decode, each, max(0.0, one - each))

    def _there_and_back(self, count: int) -> float:
        def run() -> None:
            self.swap_out(range(count), range(count))
            self.swap_in(range(count), range(count))

        return seconds(run, self._device)

    @property
    def _is_cuda(self) -> bool:
        return self._device.type == "cuda"

    def _numbers(self, blocks: Sequence[int]) -> torch.Tensor:
        """int32 on the device. Torch keeps the pinned original until it is copied."""
        numbers = torch.tensor(blocks, dtype=torch.int32, pin_memory=self._is_cuda)
        return numbers.to(self._device, non_blocking=True)
