"""KV blocks moved on the GPU, all caches of a model in one launch. Called by the GPU executor.

Blocks are moved as 32-bit words, whatever they hold. A swap goes through a staging buffer on the device, so that the
transfer over the bus is one copy by the copy engine, which takes no multiprocessor and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_WORDS = 2048  # per program
_ALIGNMENT = 16  # bytes that a thread loads at once


@dataclass(frozen=True, eq=False)
class CacheSet:
    """The caches of a model as the kernels find them.

    base: int32, the memory that offsets count from. offsets: int64 [C] in words. block_words: words per block.
    """

    base: torch.Tensor
    offsets: torch.Tensor
    num_blocks: int
    block_words: int

    @property
    def block_bytes(self) -> int:
        """Of one block in all caches."""
        return 4 * self.block_words * self.offsets.shape[0]

    @staticmethod
    def of(caches: Sequence[torch.Tensor]) -> CacheSet:
        """Caches [num_blocks, ...] of one shape and type, each dense, all views of one allocation. ValueError
        otherwise."""
        first = caches[0]
        size = first[0].numel() * first.element_size()
        storage = first.untyped_storage()
        for cache in caches:
            if cache.shape != first.shape or cache.dtype != first.dtype or not cache.is_contiguous():
                raise ValueError(f"kv_blocks: caches must be dense and alike, have {cache.shape} beside {first.shape}")
            if cache.untyped_storage()._cdata != storage._cdata:
                raise ValueError("kv_blocks: caches must be views of one allocation")
        starts = [cache.storage_offset() * cache.element_size() for cache in caches]
        if size % _ALIGNMENT or any(start % _ALIGNMENT for start in starts):
            raise ValueError(f"kv_blocks: blocks of {size} bytes must lie at multiples of {_ALIGNMENT}")
        base = torch.empty(0, dtype=torch.int32, device=first.device).set_(storage)
        offsets = torch.tensor([start // 4 for start in starts], dtype=torch.int64, device=first.device)
        return CacheSet(base, offsets, first.shape[0], size // 4)


def copy_blocks(caches: CacheSet, pairs: torch.Tensor) -> None:
    """As the reference. pairs: int32 [P, 2] on the device."""
    if pairs.dtype != torch.int32 or pairs.ndim != 2 or pairs.shape[1] != 2 or not pairs.is_contiguous():
        raise ValueError(f"copy_blocks: pairs {tuple(pairs.shape)} {pairs.dtype}: want int32 [P, 2]")
    if pairs.shape[0]:
        _copy_kernel[_grid(pairs.shape[0], caches)](
            caches.base, caches.offsets, pairs, BLOCK_WORDS=caches.block_words, WORDS=_WORDS, num_warps=4
        )


def gather_blocks(caches: CacheSet, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """Write the bytes of blocks, int32 [N] on the device, to staging, uint8 [N, C, bytes of a block] that the device
    can reach. Rows of negative numbers are left as they are."""
    words = _check_staging(caches, blocks, staging)
    if blocks.shape[0]:
        _gather_kernel[_grid(blocks.shape[0], caches)](
            caches.base, caches.offsets, blocks, words, BLOCK_WORDS=caches.block_words, WORDS=_WORDS, num_warps=4
        )


def scatter_blocks(caches: CacheSet, blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """The inverse of `gather_blocks`. Rows of negative numbers are passed over; no block appears twice."""
    words = _check_staging(caches, blocks, staging)
    if blocks.shape[0]:
        _scatter_kernel[_grid(blocks.shape[0], caches)](
            caches.base, caches.offsets, blocks, words, BLOCK_WORDS=caches.block_words, WORDS=_WORDS, num_warps=4
        )


def swap_out(
    caches: CacheSet, blocks: torch.Tensor, staging: torch.Tensor, host: torch.Tensor, host_blocks: Sequence[int]
) -> None:
    """Copy blocks, int32 [N] on the device, to rows host_blocks of host, uint8 [H, C, bytes of a block], pinned.

    staging: as host, on the device, of at least one block; it is filled and sent as often as it takes. Returns at once:
    the host may be read, and staging and the blocks written, by what follows on the same stream.
    """
    for start in range(0, blocks.shape[0], staging.shape[0]):
        part = blocks[start : start + staging.shape[0]]
        filled = staging[: part.shape[0]]
        gather_blocks(caches, part, filled)
        for row, count, place in _runs(host_blocks[start : start + part.shape[0]]):
            host[place : place + count].copy_(filled[row : row + count], non_blocking=True)


def swap_in(
    caches: CacheSet, blocks: torch.Tensor, staging: torch.Tensor, host: torch.Tensor, host_blocks: Sequence[int]
) -> None:
    """The inverse of `swap_out`; host is not to be written before the stream has got so far."""
    for start in range(0, blocks.shape[0], staging.shape[0]):
        part = blocks[start : start + staging.shape[0]]
        filled = staging[: part.shape[0]]
        for row, count, place in _runs(host_blocks[start : start + part.shape[0]]):
            filled[row : row + count].copy_(host[place : place + count], non_blocking=True)
        scatter_blocks(caches, part, filled)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(index, length, first number) of stretches of consecutive numbers: each is one copy over the bus."""
    begin = 0
    for index in range(1, len(numbers) + 1):
        if index == len(numbers) or numbers[index] != numbers[index - 1] + 1:
            yield begin, index - begin, numbers[begin]
            begin = index


def _grid(num_blocks: int, caches: CacheSet) -> tuple[int, int, int]:
    return num_blocks, caches.offsets.shape[0], triton.cdiv(caches.block_words, _WORDS)


def _check_staging(caches: CacheSet, blocks: torch.Tensor, staging: torch.Tensor) -> torch.Tensor:
    """Staging as words."""
    shape = (blocks.shape[0], caches.offsets.shape[0], 4 * caches.block_words)
    if blocks.dtype != torch.int32 or blocks.ndim != 1:
        raise ValueError(f"kv_blocks: blocks {tuple(blocks.shape)} {blocks.dtype}: want int32 [N]")
    if staging.shape != shape or staging.dtype != torch.uint8 or not staging.is_contiguous():
        raise ValueError(f"kv_blocks: staging {tuple(staging.shape)} {staging.dtype}: want dense uint8 {shape}")
    return staging.view(torch.int32)


@triton.jit
def _block_at(base, offsets, block, BLOCK_WORDS: tl.constexpr):
    """Where a block begins in the cache of this program."""
    # Caches and blocks begin at multiples of 16 bytes, which the compiler cannot see in a table.
    offset = tl.multiple_of(tl.load(offsets + tl.program_id(1)), 4)
    return base + (offset + block.to(tl.int64) * BLOCK_WORDS)


@triton.jit
def _copy_kernel(base, offsets, pairs, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr):
    """Program (pair, cache, part)."""
    pair = tl.program_id(0)
    source, target = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    mask = (word < BLOCK_WORDS) & (source >= 0) & (target >= 0)
    values = tl.load(_block_at(base, offsets, source, BLOCK_WORDS) + word, mask=mask)
    tl.store(_block_at(base, offsets, target, BLOCK_WORDS) + word, values, mask=mask)


@triton.jit
def _gather_kernel(base, offsets, blocks, staging, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr):
    """Program (block, cache, part)."""
    index = tl.program_id(0)
    block = tl.load(blocks + index)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    mask = (word < BLOCK_WORDS) & (block >= 0)
    values = tl.load(_block_at(base, offsets, block, BLOCK_WORDS) + word, mask=mask)
    row = index.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(staging + row * BLOCK_WORDS + word, values, mask=mask)


@triton.jit
def _scatter_kernel(base, offsets, blocks, staging, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr):
    """Program (block, cache, part)."""
    index = tl.program_id(0)
    block = tl.load(blocks + index)
    word = tl.program_id(2) * WORDS + tl.arange(0, WORDS)
    mask = (word < BLOCK_WORDS) & (block >= 0)
    row = index.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    values = tl.load(staging + row * BLOCK_WORDS + word, mask=mask)
    tl.store(_block_at(base, offsets, block, BLOCK_WORDS) + word, values, mask=mask)
