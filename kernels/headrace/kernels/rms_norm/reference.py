"""Op: root mean square norm, over whole rows or per head (QK-norm). Called by the torch executor for
`program.RmsNorm`; defines its meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """out = x / sqrt(mean(x^2) + eps) * weight over each group of columns (Zhang & Sennrich 2019, eq. 4).

    x: float32 [T, N * G]. weight: float32 [G]; each of the N groups of a row is normed by itself. Returns a new
    [T, N * G]. Gemma's (1 + w) is folded into the weight when a model is loaded.
    """
    group = weight.shape[0]
    if x.shape[1] == group:
        return F.rms_norm(x, (group,), weight, eps)
    return F.rms_norm(x.view(x.shape[0], -1, group), (group,), weight, eps).view(x.shape)
