"""RMSNorm against float64: widths that fill no block, heads, the residual, rows quantised; NaN and invariance."""

import pytest
import torch
from headrace.kernels.rms_norm.triton import RmsNormConfig, rms_norm

# Largest difference over the largest value: float32's own sums, then the rounding of the output to 11 and 8 bits.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
EPS = 1e-3  # large beside the rows below, so that a misplaced eps shows


def want(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    heads = x.cpu().double().view(len(x), -1, len(weight))
    scale = (heads.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return (heads / scale * weight.cpu().double()).view(x.shape)


def rows_of(num_rows: int, width: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Rows of different sizes, views of a wider buffer whose other columns hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((num_rows, width + 16), torch.nan)
    buffer[:, :width] = (
        torch.randn(num_rows, width, generator=generator) * 10.0 ** torch.linspace(-2, 2, num_rows)[:, None]
    )
    return buffer.to(dtype).to(device)[:, :width]


def poisoned(num_rows: int, width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full((num_rows, width), torch.nan, dtype=dtype, device=device)


def assert_near(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    scale = expected.abs().amax(-1, keepdim=True)
    assert ((got.cpu().double() - expected).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("num_rows", "width", "group"), [(1, 1, 1), (3, 7, 7), (2, 576, 576), (1, 5120, 5120), (5, 192, 64), (3, 240, 80)]
)
def test_rows_and_heads(num_rows: int, width: int, group: int, dtype: torch.dtype, device: str) -> None:
    x, weight = rows_of(num_rows, width, dtype, device), torch.randn(group, device=device)
    out = poisoned(num_rows, width, dtype, device)
    rms_norm(x, weight, EPS, out)
    assert_near(out, want(x, weight), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_residual_is_added_first_and_written_back_as_it_is_normed(dtype: torch.dtype, device: str) -> None:
    x, residual = rows_of(3, 100, dtype, device), rows_of(3, 100, dtype, device, seed=1)
    total = (x.float() + residual.float()).to(dtype)
    weight, out = torch.randn(100, device=device).to(dtype), poisoned(3, 100, dtype, device)
    rms_norm(x, weight, EPS, out, residual=residual)
    assert torch.equal(residual, total)
    assert_near(out, want(total, weight), TOLERANCE[dtype])


def test_in_place(device: str) -> None:
    x, weight = rows_of(4, 96, torch.float16, device), torch.randn(32, device=device)
    expected = want(x, weight)
    rms_norm(x, weight, EPS, x)
    assert_near(x, expected, 1e-3)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.int8, 127.0), (torch.float8_e4m3fn, 14.0), (torch.uint8, 14.0)])
def test_quantised_rows_fill_the_type_and_lose_half_a_step(dtype: torch.dtype, steps: float, device: str) -> None:
    x, weight = rows_of(4, 300, torch.bfloat16, device), torch.randn(300, device=device)
    x[1] = 0.0
    out, scale = torch.empty((4, 300), dtype=dtype, device=device), poisoned(4, 1, torch.float32, device)[:, 0]
    rms_norm(x, weight, EPS, out, out_scale=scale)
    values = (out.view(torch.float8_e4m3fn) if dtype == torch.uint8 else out).double() * scale[:, None].double()
    expected = want(x, weight)
    largest = expected.abs().amax(-1)
    assert_near(values, expected, 0.51 / steps)
    torch.testing.assert_close(values.cpu().abs().amax(-1)[[0, 2, 3]], largest[[0, 2, 3]], rtol=1e-5, atol=0.0)
    assert (values[1] == 0.0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float16])
def test_a_bad_row_shows_and_stays_alone(dtype: torch.dtype, poison: float, device: str) -> None:
    x, weight = rows_of(3, 64, torch.float32, device), torch.ones(64, device=device)
    x[1, 5] = poison
    out = torch.zeros((3, 64), dtype=dtype, device=device)
    scale = torch.zeros(3, device=device) if dtype != torch.float16 else None
    rms_norm(x, weight, EPS, out, out_scale=scale)
    values = out.float() if scale is None else out.float() * scale[:, None]
    assert values.isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("width", [64, 576])
@pytest.mark.parametrize("neighbours", [1, 7, 64])
def test_a_row_does_not_depend_on_its_neighbours(width: int, neighbours: int, device: str) -> None:
    x, weight = rows_of(neighbours + 1, width, torch.float16, device), torch.randn(width, device=device)
    together, alone = (poisoned(rows, width, torch.float16, device) for rows in (neighbours + 1, 1))
    rms_norm(x, weight, EPS, together)
    rms_norm(x[-1:], weight, EPS, alone)
    assert torch.equal(together[-1], alone[0])


def test_no_rows_and_other_configs(device: str) -> None:
    weight = torch.randn(48, device=device)
    rms_norm(poisoned(0, 48, torch.float16, device), weight, EPS, poisoned(0, 48, torch.float16, device))
    x, out = rows_of(5, 48, torch.float32, device), poisoned(5, 48, torch.float32, device)
    rms_norm(x, weight, EPS, out, config=RmsNormConfig(rows=4, num_warps=1))
    assert_near(out, want(x, weight), 2e-6)


def test_what_does_not_fit_is_refused(device: str) -> None:
    x, weight = torch.zeros(2, 64, device=device), torch.ones(64, device=device)
    for wrong in (
        lambda: rms_norm(x, weight[:48], EPS, x),
        lambda: rms_norm(x.T, weight[:2], EPS, x),
        lambda: rms_norm(x, weight, EPS, x[:, :32]),
        lambda: rms_norm(x, weight, EPS, x.to(torch.int8)),
        lambda: rms_norm(x, weight, EPS, x, out_scale=weight[:2]),
        lambda: rms_norm(x, weight[:32], EPS, x.to(torch.int8), out_scale=weight[:2]),
    ):
        with pytest.raises(ValueError, match="rms_norm"):
            wrong()
