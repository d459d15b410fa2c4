# mypy: ignore-errors
"""The tokens that a step starts from, where the host does not know them yet. The first launch of every step.

Called by `step.py`: with one step in flight the engine schedules the next one before it knows what was sampled, and
writes down which result of the step before it means.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 256


def resolve_tokens(token_ids: torch.Tensor, sampled: torch.Tensor) -> None:
    """Replace every id of -1 - i by sampled[i], in place.

    token_ids: int32 [T]. sampled: int32 [S], the tokens of the step before; i must be below S.
    """
    if token_ids.dtype != torch.int32 or sampled.dtype != torch.int32:
        raise ValueError(f"resolve_tokens: {token_ids.dtype} and {sampled.dtype}: want int32")
    count = token_ids.shape[0]
    _resolve_kernel[(triton.cdiv(count, _BLOCK),)](token_ids, sampled, count, BLOCK=_BLOCK, num_warps=1)


@triton.jit(do_not_specialize=["count"])
def _resolve_kernel(token_ids, sampled, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + place, mask=place < count, other=0)
    is_pending = token < 0
    resolved = tl.load(sampled - 1 - token, mask=is_pending, other=0)
    tl.store(token_ids + place, resolved, mask=is_pending)
