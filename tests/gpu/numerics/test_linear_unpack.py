"""Unpacking by inline PTX against plain Triton and against the integers, over every word there is."""

import pytest
import torch
import triton
import triton.language as tl
from headrace.kernels.linear.triton_direct import from_e4m3_bits
from headrace.kernels.linear.triton_unpack import int4_plane, int8_plane

ALL_WORDS = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@triton.jit
def _unpack_kernel(words, out, PLANE: tl.constexpr, PLANES: tl.constexpr, INLINE_ASM: tl.constexpr):
    place = tl.program_id(0) * 4096 + tl.arange(0, 4096)
    loaded = tl.load(words + place)
    dtype: tl.constexpr = out.dtype.element_ty
    if PLANES == 4:
        tl.store(out + place, int4_plane(loaded, PLANE, dtype, INLINE_ASM))
    else:
        tl.store(out + place, int8_plane(loaded, PLANE, dtype, INLINE_ASM))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("planes", "plane"), [(4, 0), (4, 1), (4, 2), (4, 3), (2, 0), (2, 1)])
def test_every_word(planes: int, plane: int, dtype: torch.dtype, device: str) -> None:
    bits = 16 // planes
    want = (ALL_WORDS.int() >> (bits * plane) & ((1 << bits) - 1)) - (1 << (bits - 1))
    for inline_asm in (False, True):
        if inline_asm and dtype == torch.float32:
            continue  # float32 has no inline form
        out = torch.full((2**16,), float("nan"), dtype=dtype, device=device)
        _unpack_kernel[(16,)](ALL_WORDS.to(device), out, PLANE=plane, PLANES=planes, INLINE_ASM=inline_asm)
        assert torch.equal(out.cpu(), want.to(dtype)), inline_asm


@triton.jit
def _e4m3_kernel(bits, out):
    place = tl.arange(0, 256)
    tl.store(out + place, from_e4m3_bits(tl.load(bits + place), out.dtype.element_ty))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_finite_fp8_number(dtype: torch.dtype, device: str) -> None:
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    out = torch.full((256,), float("nan"), dtype=dtype, device=device)
    _e4m3_kernel[(1,)](bits.to(device), out)
    want = bits.view(torch.float8_e4m3fn).to(dtype)
    assert torch.equal(out.cpu()[want.isfinite()], want[want.isfinite()])
