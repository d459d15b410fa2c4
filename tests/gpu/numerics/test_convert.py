"""Rounding to 8 bits against torch, over every bfloat16 and every float16 there is."""

import pytest
import torch
import triton
import triton.language as tl
from headrace.kernels.triton_convert import convert


@triton.jit
def convert_kernel(x, out, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + place, convert(tl.load(x + place).to(tl.float32), out.dtype.element_ty))


@pytest.fixture(params=[torch.float16, torch.bfloat16])
def everything(request: pytest.FixtureRequest) -> torch.Tensor:
    """All 2^16 values of a 16-bit float, as float32; every NaN the quiet one."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(request.param).float()
    return torch.where(values.isnan(), torch.nan, values)


def converted(x: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    out = torch.full(x.shape, 0x55, dtype=torch.uint8, device=device).view(dtype)
    convert_kernel[(len(x) // 4096,)](x.to(device), out, 4096)
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_e4m3_is_rounded_to_even_and_saturated(everything: torch.Tensor, dtype: torch.dtype, device: str) -> None:
    got = converted(everything, dtype, device).view(torch.float8_e4m3fn).float()
    want = everything.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())


def test_int8_is_rounded_to_even_and_saturated(everything: torch.Tensor, device: str) -> None:
    got = converted(everything, torch.int8, device)
    want = everything.nan_to_num(0.0).clamp(-127.0, 127.0).round().to(torch.int8)
    assert torch.equal(got, want)
