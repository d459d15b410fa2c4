"""Rows in 8 bits: as they are, gated, and normed, with a scale per row or per 128 columns, against float64.

The tolerance is half a step of the type (1/127 of the largest for int8; e4m3 has 3 bits of mantissa) and 1 % of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from headrace.kernels.activation.triton import gated_activation
from headrace.kernels.activation.triton_quantize import quantize_rows
from headrace.kernels.rms_norm.triton import rms_norm

TYPES = (torch.int8, torch.float8_e4m3fn, torch.uint8)
Fill = Callable[[torch.Tensor, torch.Tensor], None]


def rows_of(rows: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes, views of a wider buffer whose other columns hold NaN."""
    buffer = torch.full((rows, width + 8), torch.nan)
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + width))
    buffer[:, :width] = values * 10.0 ** torch.linspace(-1, 1, rows)[:, None]
    return buffer.to(dtype).to(device)[:, :width]


def quantized(fill: Fill, rows: int, width: int, dtype: torch.dtype, in_groups: bool, device: str) -> torch.Tensor:
    """What `fill(out, scale)` leaves, as float64 values. Both are poisoned before, and columns beyond must stay so."""
    wide = torch.full((rows, width + 16), 0x55, dtype=torch.uint8, device=device)
    out = wide[:, :width].view(dtype)
    shape = (rows, -(-width // 128)) if in_groups else (rows,)
    scale = torch.full(shape, torch.nan, device=device)
    fill(out, scale)
    assert (wide[:, width:] == 0x55).all()
    values = (out.view(torch.float8_e4m3fn) if dtype == torch.uint8 else out).cpu().double()
    spread = scale.repeat_interleave(128, 1)[:, :width] if in_groups else scale[:, None]
    return values * spread.cpu().double()


def assert_near(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, in_groups: bool) -> None:
    padded = torch.nn.functional.pad(want, (0, -want.shape[1] % 128)).view(len(want), -1, 128)
    largest = padded.abs().amax(2).repeat_interleave(128, 1)[:, : want.shape[1]]
    if not in_groups:
        largest = want.abs().amax(1, keepdim=True).expand(want.shape)
    step = largest / 127 if dtype == torch.int8 else torch.maximum(want.abs() / 8, largest / 448 / 64)
    assert ((got - want).abs() <= 0.505 * step + 1e-12).all()
    is_full = torch.isclose(got.abs(), largest, rtol=1e-5, atol=0.0)  # the largest fills the type
    assert is_full.any(1).all()


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [1, 300, 4100])
def test_rows_as_they_are(width: int, dtype: torch.dtype, in_groups: bool, device: str) -> None:
    x = rows_of(3, width, torch.bfloat16, device)
    got = quantized(lambda out, scale: quantize_rows(x, out, scale), 3, width, dtype, in_groups, device)
    assert_near(got, x.cpu().double(), dtype, in_groups)


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", TYPES[:2])
def test_gated(dtype: torch.dtype, kind: str, in_groups: bool, device: str) -> None:
    gate, up = rows_of(3, 2100, torch.float16, device), rows_of(3, 2100, torch.float16, device, seed=1)

    def fill(out: torch.Tensor, scale: torch.Tensor) -> None:
        gated_activation(gate, up, kind, out, out_scale=scale)  # type: ignore[arg-type]

    g, u = gate.cpu().double(), up.cpu().double()
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)
    want = (g / (1 + (-g).exp()) if kind == "silu" else 0.5 * g * (1 + inner.tanh())) * u
    assert_near(quantized(fill, 3, 2100, dtype, in_groups, device), want, dtype, in_groups)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [64, 128, 576])
def test_normed_in_groups(width: int, dtype: torch.dtype, device: str) -> None:
    x, residual = rows_of(3, width, torch.bfloat16, device), rows_of(3, width, torch.bfloat16, device, seed=1)
    weight = torch.randn(width, generator=torch.Generator().manual_seed(3)).to(device)
    total = (x.float() + residual.float()).to(torch.bfloat16).cpu().double()

    def fill(out: torch.Tensor, scale: torch.Tensor) -> None:
        rms_norm(x, weight, 1e-3, out, residual=residual, out_scale=scale)

    want = total / (total.pow(2).mean(1, keepdim=True) + 1e-3).sqrt() * weight.cpu().double()
    assert_near(quantized(fill, 3, width, dtype, True, device), want, dtype, True)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("in_groups", [False, True])
def test_a_bad_row_shows_and_stays_alone(in_groups: bool, poison: float, device: str) -> None:
    x = rows_of(3, 200, torch.float32, device)
    x[1, 150] = poison

    def fill(out: torch.Tensor, scale: torch.Tensor) -> None:
        quantize_rows(x, out, scale)

    is_finite = quantized(fill, 3, 200, torch.int8, in_groups, device).isfinite()
    assert is_finite.all(1).tolist() == [True, False, True]
    assert is_finite[1, :128].all() == in_groups
    norm = quantized(
        lambda out, scale: rms_norm(x, torch.ones(200, device=device), 1e-5, out, out_scale=scale),
        3, 200, torch.int8, in_groups, device,
    )  # fmt: skip
    assert norm.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("in_groups", [False, True])
def test_a_row_of_zeros_is_zeros_and_a_row_does_not_depend_on_its_neighbours(in_groups: bool, device: str) -> None:
    x = rows_of(5, 300, torch.float16, device)
    x[2] = 0.0
    together = quantized(lambda o, s: quantize_rows(x, o, s), 5, 300, torch.int8, in_groups, device)
    alone = quantized(lambda o, s: quantize_rows(x[4:], o, s), 1, 300, torch.int8, in_groups, device)
    assert torch.equal(together[4:], alone)
    assert (together[2] == 0.0).all()


def test_what_does_not_fit_is_refused(device: str) -> None:
    x, q = torch.zeros(2, 256, device=device), torch.zeros(2, 256, dtype=torch.int8, device=device)
    scale = torch.zeros(2, device=device)
    for wrong in (
        lambda: quantize_rows(x, q[:, :128], scale),
        lambda: quantize_rows(x, q, scale[:1]),
        lambda: quantize_rows(x, x, scale),
        lambda: quantize_rows(x, q, torch.zeros(2, 3, device=device)),
        lambda: quantize_rows(x, q, torch.zeros(2, 2, device=device).T),
    ):
        with pytest.raises(ValueError, match="quantize_rows"):
            wrong()
    with pytest.raises(ValueError, match="out_scale goes with"):
        gated_activation(x, x, "silu", q)
    with pytest.raises(ValueError, match="dense along a row"):
        rms_norm(x, x[0], 1e-5, q, out_scale=torch.zeros(2, 3, device=device))
    quantize_rows(x[:0], q[:0], scale[:0])
