"""Ops: element-wise non-linearities. Called by the torch executor for `program.GatedActivation` and
`program.SoftCap`; defines their meaning."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
    """out = act(gate) * up (Shazeer 2020: SwiGLU, GEGLU).

    gate, up: float32 [T, I]; `gate` is used up. silu(x) = x / (1 + exp(-x)); gelu_tanh(x) = x / 2 * (1 +
    tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) (Hendrycks & Gimpel 2016). Returns float32 [T, I].
    """
    activated = F.silu(gate, inplace=True) if kind == "silu" else F.gelu(gate, approximate="tanh")
    return activated.mul_(up)


def soft_cap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """x = cap * tanh(x / cap), in place; any float32 shape. Returns x."""
    return x.div_(cap).tanh_().mul_(cap)
