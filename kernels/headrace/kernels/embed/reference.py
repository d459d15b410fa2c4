"""Op: look up token embeddings. Called by the torch executor for `program.Embed`; defines its meaning."""

from __future__ import annotations

import torch


def embed(token_ids: torch.Tensor, table: torch.Tensor, scale: float) -> torch.Tensor:
    """out[t] = table[token_ids[t]] * scale.

    token_ids: int64 [T], each in 0..V-1 (IndexError otherwise). table: float32 [V, D]. Returns float32 [T, D].
    scale is rounded to float32 before it multiplies: Gemma's sqrt(D), 1.0 for everybody else.
    """
    out = table.index_select(0, token_ids)
    return out if scale == 1.0 else out.mul_(scale)
