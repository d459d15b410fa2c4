"""8-bit keys and values by their 16-bit words: inline PTX and plain Triton, over all 2^16 words.

The PTX form runs where inline PTX does: on a GPU, and in our interpreter, which emulates it.
"""

import pytest
import torch
import triton
import triton.language as tl
from headrace.kernels.paged_attention.triton_unpack import FP8_FACTOR, KV_FP8, KV_INT8, column

BLOCK = 4096


@triton.jit
def unpack_all(words_ptr, out_ptr, ODD: tl.constexpr, KV: tl.constexpr, INLINE_ASM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, column(tl.load(words_ptr + at), ODD, KV, tl.float16, INLINE_ASM))


@pytest.mark.parametrize("inline_asm", [False, True])
@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_every_word(kv: str, odd: bool, inline_asm: bool, device: str) -> None:
    words = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    out = torch.full((1 << 16,), torch.nan, dtype=torch.float16, device=device)
    kind = {"int8": KV_INT8, "fp8": KV_FP8}[kv].value
    unpack_all[(1 << 16) // BLOCK,](words.to(device), out, ODD=odd, KV=kind, INLINE_ASM=inline_asm, BLOCK=BLOCK)
    bytes_ = words.view(torch.int8)[int(odd) :: 2]  # little-endian: the even column is the low byte
    got = out.float().cpu()
    if kv == "int8":
        assert torch.equal(got, bytes_.float())
        return
    want = bytes_.view(torch.float8_e4m3fn).float()
    is_number = ~want.isnan()
    assert torch.equal(got[is_number] * FP8_FACTOR.value, want[is_number])
    assert torch.equal(got[~is_number].abs(), torch.full_like(got[~is_number], 1.875))
