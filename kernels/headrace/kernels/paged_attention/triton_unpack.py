"""Device functions from 8-bit keys and values, read as 16-bit words of two columns, to columns in the dot's type.

A 16-bit tile goes from shared memory to the matrix unit by ldmatrix, transposed where it must be; single bytes cannot,
and would be fetched one by one. So the attention kernels read a cache of bytes as int16 and multiply its even and its
odd columns apart. Called by triton_tile.py.

Each function exists twice: inline PTX on pairs of words, and plain Triton for float32, other targets and the checkers;
tests/gpu/numerics/test_paged_attention_unpack.py runs both over all 2^16 words. All arithmetic here is exact.
"""

import triton
import triton.language as tl

# Storage of the KV cache: the dot's own type, int8, e4m3 (by its bits: no target needs to know the type).
KV_PLAIN = tl.constexpr(0)
KV_INT8 = tl.constexpr(1)
KV_FP8 = tl.constexpr(2)

# What `column` leaves to its caller of e4m3: its exponent's bias is 7, float16's is 15.
FP8_FACTOR = tl.constexpr(256.0)


@triton.jit
def column(words, ODD: tl.constexpr, KV: tl.constexpr, DOT: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The even or odd bytes of int16 words as numbers in DOT: of KV_INT8 the byte, of KV_FP8 the value / FP8_FACTOR.

    NaN of e4m3 becomes +-1.875, that is 480 / 256.
    """
    if KV == KV_INT8:
        # 0x6400 is float16's 1024; or-ed into its mantissa, the byte plus 128 makes 1152 + byte.
        return (_biased(words, ODD, INLINE_ASM).to(tl.float16, bitcast=True) - 1152.0).to(DOT)
    else:
        return _moved(words, ODD, INLINE_ASM).to(tl.float16, bitcast=True).to(DOT)


@triton.jit
def _on_pairs(words, TEXT: tl.constexpr):
    """Inline PTX from two words in $1 to two 16-bit results in $0."""
    return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def _biased(words, ODD: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The bits of float16 1024 + (byte + 128)."""
    if not INLINE_ASM:
        return (((words >> (8 * ODD)) & 0xFF) ^ 0x80) | 0x6400
    elif not ODD:
        return _on_pairs(words, "lop3.b32 $0, $1, 0x00FF00FF, 0x64806480, 0x6A;")  # (a & b) ^ c
    else:
        return _on_pairs(
            words,
            "{ .reg .b32 t, high; mov.b32 high, 0x64646464; prmt.b32 t, $1, high, 0x4341; xor.b32 $0, t, 0x00800080; }",
        )


@triton.jit
def _moved(words, ODD: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The bits of float16 with e4m3's sign, exponent (15 - 7 too small) and mantissa, each at its place."""
    if not INLINE_ASM:
        byte = words >> (8 * ODD)
        return ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    elif not ODD:
        return _on_pairs(
            words,
            "{ .reg .b32 s, t; shl.b32 s, $1, 8; shl.b32 t, $1, 7; and.b32 t, t, 0x3F803F80;"
            " lop3.b32 $0, s, 0x80008000, t, 0xEA; }",  # (a & b) | c
        )
    else:
        return _on_pairs(
            words,
            "{ .reg .b32 t; shr.u32 t, $1, 1; and.b32 t, t, 0x3F803F80; lop3.b32 $0, $1, 0x80008000, t, 0xEA; }",
        )
