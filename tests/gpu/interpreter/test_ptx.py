"""The emulated PTX against the definitions of the PTX ISA, and packed int4 unpacking over all 2^16 words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.gpu.interpreter import ptx


@triton.jit
def unpack_kernel(words, out, N: tl.constexpr):
    at = tl.arange(0, N)
    packed = tl.load(words + at)
    low = tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, 0x000F000F, 0x64006400, 0xEA;", "=r,r", [packed], dtype=tl.int16, is_pure=True, pack=2
    )
    high = tl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, 12; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }",
        "=r,r",
        [packed],
        dtype=tl.int16,
        is_pure=True,
        pack=2,
    )
    tl.store(out + at, low.to(tl.float16, bitcast=True) - 1024.0)
    tl.store(out + N + at, high.to(tl.float16, bitcast=True) - 1024.0)


def one(text: str, *inputs: int) -> int:
    words = [np.array([value & 0xFFFFFFFF], dtype=np.uint32) for value in inputs]
    return int(ptx.run(text, words, 1)[0][0])


def test_lop3_unpacks_every_word_of_four_nibbles() -> None:
    words = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    out = torch.empty(2, 2**16, dtype=torch.float16)
    unpack_kernel[(1,)](words, out, N=2**16)
    assert torch.equal(out[0].int(), words.int() & 15)
    assert torch.equal(out[1].int(), words.int() >> 12 & 15)


@pytest.mark.parametrize(
    ("text", "inputs", "expected"),
    [
        ("lop3.b32 $0, $1, $2, $3, 0x96;", (0b1100, 0b1010, 0b0110), 0b1100 ^ 0b1010 ^ 0b0110),
        ("prmt.b32 $0, $1, $2, 0x5410;", (0x33221100, 0x77665544), 0x55441100),
        ("prmt.b32 $0, $1, $2, 0xBA98;", (0x80FF7F00, 0), 0xFFFF0000),
        ("shl.b32 $0, $1, 32;", (1,), 0),
        ("shr.s32 $0, $1, 40;", (0x80000000,), 0xFFFFFFFF),
        ("dp4a.s32.s32 $0, $1, $2, $3;", (0xFF020304, 0x01010101, 10), 10 + 4 + 3 + 2 - 1),
        ("fma.rn.f16x2 $0, $1, $2, $3;", (0x3C004000, 0x40004000, 0x3C003C00), 0x42004500),
        ("add.bf16x2 $0, $1, $2;", (0x3F803F80, 0x3F803F80), 0x40004000),
        ("cvt.rn.satfinite.e4m3x2.f32 $0, $1, $2;", (0x3F800000, 0x7F000000), 0x387E),
        ("cvt.rn.f16x2.e4m3x2 $0, $1;", (0x387E,), 0x3C005F00),
        ("ex2.approx.ftz.f32 $0, $1;", (0x40000000,), 0x40800000),
    ],
)
def test_instructions(text: str, inputs: tuple[int, ...], expected: int) -> None:
    assert one(text, *inputs) == expected


def test_an_unknown_instruction_is_an_error() -> None:
    with pytest.raises(NotImplementedError, match="bfind"):
        one("bfind.u32 $0, $1;", 1)
