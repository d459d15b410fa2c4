"""Op: matrix product with a weight. Called by the torch executor for `program.Linear`; defines its meaning."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """out = x @ weight.T (+ bias).

    x: float32 [T, K]. weight: float32 [N, K] (quantised weights are dequantised when they are loaded). bias: float32
    [N] or None. Returns float32 [T, N]. The order of the sum over K is the BLAS library's and may change with T.
    """
    return F.linear(x, weight, bias)
