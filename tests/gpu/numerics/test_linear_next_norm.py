"""A norm between two products, prepared by the first and finished by the second, against float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.epilogue import NextNorm
from headrace.kernels.linear.triton import COUNTER_BYTES, linear, workspace_bytes

from tests.gpu.numerics.linear_case import TOLERANCE, Case, dense_case, error, quant_case
from tests.gpu.numerics.test_linear_quantized import case_of

EPS = 1e-3  # large beside the mean square of some rows below, so that a misplaced eps shows


@dataclass(frozen=True)
class First:
    """What the first product leaves."""

    out: torch.Tensor
    normed: torch.Tensor
    squares: torch.Tensor


def weight_of(n: int, device: str) -> torch.Tensor:
    return (torch.rand(n, generator=torch.Generator().manual_seed(8)) + 0.5).to(device)


def workspace_of(case: Case, m: int, device: str) -> torch.Tensor:
    workspace = torch.zeros(workspace_bytes(case.packed, m, case.config), dtype=torch.uint8, device=device)
    workspace[COUNTER_BYTES:] = 0xFF
    return workspace


def run_first(case: Case, x: torch.Tensor, x_scale: torch.Tensor | None = None, has_residual: bool = True) -> First:
    """Into columns of wider, poisoned buffers."""
    device, m, n = str(x.device), x.shape[0], case.packed.out_features
    out, normed = (torch.full((m, n + 8), float("nan"), dtype=case.packed.dtype, device=device) for _ in range(2))
    squares = torch.full((m, -(-n // 32) + 1), float("nan"), device=device)
    first = First(out[:, :n], normed[:, :n], squares[:, :-1])
    _, bias = case.extras(device)
    workspace = workspace_of(case, m, device)
    linear(
        x,
        case.packed.to(device),
        first.out,
        bias=bias if case.bias else None,
        residual=case.residual_of(m, device) if has_residual else None,
        x_scale=x_scale,
        next_norm=NextNorm(weight_of(n, device), first.normed, first.squares),
        workspace=workspace,
        config=case.config,
    )
    assert not workspace[:COUNTER_BYTES].any()
    assert all(beyond.isnan().all() for beyond in (out[:, n:], normed[:, n:], squares[:, -1]))
    return first


def run_second(case: Case, first: First) -> torch.Tensor:
    device, m = str(first.out.device), first.out.shape[0]
    out = torch.full((m, case.packed.out_features), float("nan"), dtype=case.packed.dtype, device=device)
    _, bias = case.extras(device)
    linear(
        first.normed,
        case.packed.to(device),
        out,
        bias=bias if case.bias else None,
        residual=case.residual_of(m, device) if case.residual else None,
        activation=case.activation,
        squares=(first.squares, EPS),
        workspace=workspace_of(case, m, device),
        config=case.config,
    )
    return out


def norm_of(h: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    h = h.cpu().double()
    return h / (h.pow(2).mean(1, keepdim=True) + EPS).sqrt() * weight.cpu().to(dtype).double()


def check(first: Case, second: Case, m: int, device: str, has_residual: bool = True) -> None:
    x = first.rows(m, device)
    done = run_first(first, x, has_residual=has_residual)
    dtype, n = first.packed.dtype, first.packed.out_features
    want = replace(first, residual=has_residual).want(x)
    assert error(done.out, want) < TOLERANCE[dtype]
    h, weight = done.out.cpu(), weight_of(n, device)
    assert torch.equal(done.normed.cpu(), h * weight.cpu().to(dtype))
    padded = torch.nn.functional.pad(h.double(), (0, -n % 32)).view(m, -1, 32)
    torch.testing.assert_close(done.squares.cpu().double(), padded.pow(2).sum(2), rtol=1e-6, atol=1e-12)
    got = run_second(second, done)
    assert error(got, replace(second, norm=False).want(norm_of(h, weight, dtype))) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", [1, 5, 17, 33, 130])
def test_rows(m: int, device: str) -> None:
    first = quant_case("int4", 96, 256, 32, "any", torch.bfloat16, bias=True)
    check(first, quant_case("int4", 72, 96, 32, "any", torch.bfloat16, "silu"), m, device)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_columns_that_fill_no_piece(dtype: torch.dtype, device: str) -> None:
    check(dense_case(72, 300, dtype), dense_case(40, 72, dtype, bias=True, residual=True), 3, device)
    check(dense_case(20, 64, dtype), dense_case(40, 20, dtype), 3, device, has_residual=False)


def test_chunks_of_k_on_both_sides(device: str) -> None:
    first, second = (quant_case("int8", 64, 1024, 32, "none", torch.float16) for _ in range(2))
    assert first.packed.num_splits > 1
    first = quant_case("int8", 1024, 1024, 32, "none", torch.float16)
    check(first, second, 3, device)


@pytest.mark.parametrize("kind", ["fp8", "fp8_block"])
def test_after_fp8_weights_with_wide_rows(kind: str, device: str) -> None:
    check(case_of(kind, 128, 256), dense_case(40, 128, torch.float16), 3, device)


@pytest.mark.parametrize("kind", ["int4", "dense"])
def test_a_row_has_the_same_bits_alone_and_among_neighbours(kind: str, device: str) -> None:
    """Whatever the tiles too: pieces of 32 columns lie in tiles of 32 and of 128."""
    make = {
        "int4": lambda n, k: quant_case("int4", n, k, 32, "any", torch.float16),
        "dense": lambda n, k: dense_case(n, k, torch.float16),
    }[kind]
    first, second = make(256, 256), make(64, 256)
    x = first.rows(70, device)
    alone = run_first(first, x[:1])
    want = run_second(second, alone)
    configs = (None, LinearConfig(32, 128, 4, 2, split_programs=0), LinearConfig(16, 16, 1, 2))
    for m in (2, 40, 70):
        for config in configs if m == 2 else (None,):
            among = run_first(replace(first, config=config), x[:m])
            assert torch.equal(among.squares[:1], alone.squares), (m, config)
            assert torch.equal(run_second(replace(second, config=config), among)[:1], want), (m, config)


def test_nan_stays_in_its_row(device: str) -> None:
    first, second = (dense_case(64, 64, torch.float16) for _ in range(2))
    x = first.rows(3, device)
    x[1, 5] = float("nan")
    got = run_second(second, run_first(first, x))
    assert got.isfinite().all(1).tolist() == [True, False, True]


def test_what_does_not_fit_is_refused(device: str) -> None:
    case = dense_case(64, 64, torch.float16)
    x, packed = case.rows(2, device), case.packed.to(device)
    out, weight = torch.zeros_like(x), torch.ones(64, device=device)
    squares = torch.zeros(2, 2, device=device)
    for wrong in (
        lambda: linear(x, packed, out, next_norm=NextNorm(weight, out[:, :32], squares)),
        lambda: linear(x, packed, out, next_norm=NextNorm(weight, out, squares[:, :1])),
        lambda: linear(x, packed, out, next_norm=NextNorm(weight[:32], out, squares)),
        lambda: linear(x, packed, out, squares=(squares[:, :1], EPS)),
        lambda: linear(x, packed, out, squares=(squares, EPS), norm=(weight, EPS)),
    ):
        with pytest.raises(ValueError, match="linear"):
            wrong()
