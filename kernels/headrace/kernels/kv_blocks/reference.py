"""The meaning of moving KV blocks, in torch. Called by tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def copy_blocks(caches: Sequence[torch.Tensor], pairs: torch.Tensor) -> None:
    """caches[c][target] = caches[c][source] for each pair (source, target), in place.

    pairs: int32 [P, 2]; a pair with a negative number does nothing. No target is also a source, or twice a target.
    """
    for source, target in pairs.tolist():
        if source >= 0 and target >= 0:
            for cache in caches:
                cache[target] = cache[source]


def gather_blocks(caches: Sequence[torch.Tensor], blocks: torch.Tensor) -> torch.Tensor:
    """Bytes of blocks, uint8 [N, C, bytes of a block], of the C caches. blocks: int32 [N]; negative: zeros."""
    size = caches[0][0].numel() * caches[0].element_size()
    out = torch.zeros((len(blocks), len(caches), size), dtype=torch.uint8)
    for i, block in enumerate(blocks.tolist()):
        for c, cache in enumerate(caches):
            if block >= 0:
                out[i, c] = cache[block].contiguous().view(-1).view(torch.uint8)
    return out


def scatter_blocks(caches: Sequence[torch.Tensor], blocks: torch.Tensor, staging: torch.Tensor) -> None:
    """The inverse of `gather_blocks`: write each row of staging into its block. Negative numbers are passed over."""
    for i, block in enumerate(blocks.tolist()):
        for c, cache in enumerate(caches):
            if block >= 0:
                cache[block] = staging[i, c].view(cache.dtype).view(cache[block].shape)
