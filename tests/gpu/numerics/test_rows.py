"""Rows added and gathered, views of wider buffers among them."""

import math

import pytest
import torch
from headrace.kernels.gpu.triton_rows import add, select


def wide(rows: int, width: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """[rows, width], columns of a wider buffer whose others are NaN."""
    values = torch.full((rows + 1, width + 24), math.nan, dtype=dtype)
    values[:rows, 8 : 8 + width] = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.to(device)[:rows, 8 : 8 + width]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 5), (3, 1030)])
def test_add(rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    a, b = (wide(rows, width, dtype, device, seed) for seed in (1, 2))
    want = a.cpu() + b.cpu()
    out = wide(rows, width, dtype, device, 3)
    add(a, b, out)
    assert torch.equal(out.cpu(), want)
    add(a, b, a)
    assert torch.equal(a.cpu(), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_select(dtype: torch.dtype, device: str) -> None:
    x = wide(9, 1030, torch.float32, device, 4).to(dtype)
    out = torch.zeros((4, 1030), dtype=dtype, device=device)
    select(x, torch.tensor([8, 0, 3, 3], dtype=torch.int32, device=device), out)
    assert torch.equal(out.cpu(), x.cpu()[[8, 0, 3, 3]])


def test_refusals(device: str) -> None:
    x, rows = torch.zeros(4, 8, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    add(x[:0], x[:0], x[:0])
    for wrong in (
        lambda: add(x, x[:3], x),
        lambda: add(x.T, x.T, x.T),
        lambda: select(x, rows, x[:3].clone()),
        lambda: select(x, rows.long(), x[:2].clone()),
        lambda: select(x, rows, x[:2].half()),
    ):
        with pytest.raises(ValueError, match=r"add|select"):
            wrong()
