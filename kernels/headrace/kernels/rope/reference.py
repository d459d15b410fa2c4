"""Op: rotary position embedding. Called by the torch executor for `program.Rope`; defines its meaning.

How inv_freq follows from a model's settings is the models' business (`headrace.models.rope`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class RopeTable:
    """cos and sin of one step's positions, shared by all layers that turn alike.

    cos: float32 [T, 1, 1, half]. sin: float32 [T, 1, 2, half], negated for the first half.
    """

    cos: torch.Tensor
    sin: torch.Tensor


def rope_table(positions: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float) -> RopeTable:
    """The angle of element i at row t is positions[t] * inv_freq[i], a product rounded to float32.

    positions: float32 [T]. inv_freq: float32 [half]. attention_factor scales cos and sin (YaRN, Peng et al. 2023).
    """
    angles = torch.outer(positions, inv_freq)
    cos, sin = angles.cos().mul_(attention_factor), angles.sin().mul_(attention_factor)
    return RopeTable(cos[:, None, None, :], torch.stack((-sin, sin), dim=1)[:, None])


def rope(x: torch.Tensor, table: RopeTable) -> torch.Tensor:
    """Turn each head's pairs (i, i + half) by the table's angles (Su et al. 2021, the halves form).

    x: float32 [T, N * 2 * half]. Returns a new tensor of the same shape:
    first = x1 * cos - x2 * sin, second = x2 * cos + x1 * sin.
    """
    rows, _, _, half = table.cos.shape
    pairs = x.view(rows, -1, 2, half)
    return (pairs * table.cos).addcmul_(pairs.flip(2), table.sin).view(x.shape)
