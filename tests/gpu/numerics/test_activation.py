"""The non-linearities that stand alone, against float64."""

import math

import pytest
import torch
from headrace.kernels.activation.triton import gated_activation, soft_cap

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def wide(rows: int, width: int, dtype: torch.dtype, device: str, scale: float = 4.0) -> torch.Tensor:
    """Rows of a buffer whose other columns hold NaN."""
    buffer = torch.full((rows, width + 8), torch.nan)
    buffer[:, :width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * scale
    return buffer.to(dtype).to(device)[:, :width]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 100, 2049])
def test_gated(width: int, kind: str, dtype: torch.dtype, device: str) -> None:
    gate, up = wide(3, width, dtype, device), wide(3, width, dtype, device).flip(0)
    gate[0, 0], gate[1, 0] = 100.0, -100.0
    g, u = gate.cpu().double(), up.cpu().double()
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    want = (g / (1 + (-g).exp()) if kind == "silu" else 0.5 * g * (1 + inner.tanh())) * u
    out = torch.full_like(gate, torch.nan)
    gated_activation(gate, up, kind, out)  # type: ignore[arg-type]
    assert ((out.cpu().double() - want).abs() <= TOLERANCE[dtype] * want.abs().clamp(min=1.0)).all()
    gated_activation(gate, up, kind, gate)  # type: ignore[arg-type]
    assert torch.equal(gate, out)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap(cap: float, dtype: torch.dtype, device: str) -> None:
    x = wide(2, 2100, dtype, device, scale=40.0)
    x[0, :5] = torch.tensor([0.0, 1e-4, -1e-4, 1e30 if dtype != torch.float16 else 6e4, torch.nan])
    want = cap * (x.cpu().double() / cap).tanh()
    soft_cap(x, cap)
    assert x[0, 4].isnan()
    got, want = x.cpu().double().nan_to_num(0.0), want.nan_to_num(0.0)
    assert ((got - want).abs() <= TOLERANCE[dtype] * want.abs() + 1e-12).all()


def test_what_does_not_fit_is_refused(device: str) -> None:
    x = torch.zeros(2, 8, device=device)
    for wrong in (
        lambda: gated_activation(x, x[:, :4], "silu", x),
        lambda: gated_activation(x.T, x.T, "silu", x.T),
        lambda: soft_cap(x[0], 1.0),
        lambda: soft_cap(x, 0.0),
    ):
        with pytest.raises(ValueError, match=r"gated_activation|soft_cap"):
            wrong()
    gated_activation(x[:0], x[:0], "silu", x[:0])
    soft_cap(x[:0], 1.0)
