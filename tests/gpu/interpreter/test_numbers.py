"""The corrected interpreter's numbers against torch's, bit for bit: every test here fails on the stock interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}


@triton.jit
def cast_kernel(src, dst, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(dst + at, tl.load(src + at).to(dst.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, out, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + N + at, a * b)
    tl.store(out + 2 * N + at, tl.maximum(a, b))
    tl.store(out + 3 * N + at, tl.where(a > b, a - b, a * 0.5))


@triton.jit
def dot_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + m[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(out + m[:, None] * N + n[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def reduce_kernel(x, out, index, total, N: tl.constexpr):
    at = tl.arange(0, N)
    value = tl.load(x + at)
    tl.store(out, tl.max(value, 0))
    tl.store(index, tl.argmax(value, 0))
    tl.store(total, tl.sum(value, 0))


@triton.jit
def scale_kernel(x, out, factor, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, (tl.load(x + at) * factor).to(tl.float32))


@triton.jit
def loop_kernel(out, count, stride):
    for index in range(count):
        tl.store(out + index.to(tl.int64) * stride, index)


@triton.jit
def sort_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, tl.sort(tl.load(x + at)))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def all_of(name: str) -> torch.Tensor:
    """Every number of a type with 8 or 16 bits; for float32 the neighbours of every bf16, where rounding decides."""
    if name in ("e4m3", "e5m2"):
        return torch.arange(256, dtype=torch.uint8).view(DTYPES[name])
    short = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if name != "fp32":
        return short.view(DTYPES[name])
    high = short.to(torch.int32) << 16
    return torch.cat([high | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000)]).view(torch.float32)


@pytest.mark.parametrize("source", ["fp32", "fp16", "bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize("target", ["fp32", "fp16", "bf16", "e4m3", "e5m2"])
def test_casts_are_torchs(source: str, target: str) -> None:
    src = all_of(source)
    out = torch.empty(src.shape, dtype=DTYPES[target])
    cast_kernel[(1,)](src, out, N=src.numel())
    wide = src.to(torch.float32)
    if target in ("e4m3", "e5m2") and source != target:  # hardware saturates (satfinite), torch overflows
        largest = torch.finfo(DTYPES[target]).max
        wide = torch.where(wide.isnan(), wide, wide.clamp(-largest, largest))
    expected = wide.to(DTYPES[target])
    assert torch.equal(out.float().isnan(), expected.float().isnan())
    number = ~expected.float().isnan()
    assert torch.equal(bits(out)[number], bits(expected)[number])


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_arithmetic_rounds_after_every_operation(name: str) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(1024).to(DTYPES[name]) for _ in range(2))
    out = torch.empty(4, 1024, dtype=DTYPES[name])
    arithmetic_kernel[(1,)](x, y, out, N=1024)
    expected = torch.stack([x + y, x * y, torch.maximum(x, y), torch.where(x > y, x - y, x * 0.5)])
    assert torch.equal(bits(out), bits(expected))


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3", "e5m2"])
def test_dot_multiplies_what_the_bits_mean(name: str) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(DTYPES[name]), torch.randn(64, 32).to(DTYPES[name])
    out = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, out, M=16, N=32, K=64, PRECISION="ieee")
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("precision", "smallest", "largest"), [("tf32", 5e-5, 1e-3), ("ieee", 0.0, 1e-7)])
def test_float32_dot_loses_what_tf32_loses(precision: str, smallest: float, largest: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(16, 64), torch.randn(64, 32)
    out = torch.empty(16, 32)
    dot_kernel[(1,)](a, b, out, M=16, N=32, K=64, PRECISION=precision)
    exact = a.double() @ b.double()
    assert smallest <= float((out - exact).norm() / exact.norm()) <= largest


def test_int8_dot_is_exact() -> None:
    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((16, 64), (64, 32)))
    out = torch.empty(16, 32, dtype=torch.int32)
    dot_kernel[(1,)](a, b, out, M=16, N=32, K=64, PRECISION="ieee")
    assert torch.equal(out, a.int() @ b.int())


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_max_drops_nan_and_ties_go_left(name: str) -> None:
    x = torch.tensor([float("nan"), 1, 7, 7, -3, 7, 0, float("nan")]).to(DTYPES[name])
    out, total = torch.empty(2, dtype=torch.float32)
    index = torch.empty(1, dtype=torch.int32)
    reduce_kernel[(1,)](x[1:5].clone(), out, index, total, N=4)
    assert (out.item(), index.item(), total.item()) == (7, 1, 12)
    reduce_kernel[(1,)](x, out, index, total, N=8)
    assert out.item() == 7
    assert total.isnan()


def test_a_float_argument_is_float32_and_not_the_tensors_type() -> None:
    x, out = torch.full((16,), 1.5, dtype=torch.float16), torch.empty(16)
    scale_kernel[(1,)](x, out, 1.0001, N=16)
    assert out[0].item() == pytest.approx(1.50015, abs=1e-6)


def test_a_loop_variable_is_a_tensor() -> None:
    out = torch.full((9,), -1, dtype=torch.int32)
    loop_kernel[(1,)](out, 3, 4)
    assert out.tolist() == [0, -1, -1, -1, 1, -1, -1, -1, 2]


def test_sort_is_quick_enough_to_test_with() -> None:
    torch.manual_seed(0)
    x = torch.randn(512)
    out = torch.empty_like(x)
    sort_kernel[(1,)](x, out, N=512)
    assert torch.equal(out, x.sort().values)


def test_nothing_here_is_compiled() -> None:
    kernel: Any = cast_kernel
    assert type(kernel).__name__ == "InterpretedFunction"
