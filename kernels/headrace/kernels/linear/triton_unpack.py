"""Device functions from the 16-bit words of `layout.py` to weights of the compute dtype.

Each exists twice: inline PTX on pairs of words (one lop3 or prmt per pair and plane; Kim et al. 2022, "Who says
elephants can't run", section 3.4, for the magic numbers) and plain Triton, for float32, other targets and the checkers.
tests/gpu/numerics/test_linear_unpack.py runs both over all 2^16 words. All arithmetic here is exact.

A nibble or byte u or-ed into the mantissa of 2^p is the float 2^p + u: 0x6400 is float16's 1024 (u < 1024), 0x4300
bfloat16's 128 (u < 128, so a byte is taken as two nibbles). bfloat16 has no add before sm_90: its sums are fma.
"""

import triton
import triton.language as tl


@triton.jit
def int4_plane(words, PLANE: tl.constexpr, dtype: tl.constexpr, INLINE_ASM: tl.constexpr):
    """Nibble PLANE of each int16 word, minus 8, as dtype."""
    if dtype == tl.float16:
        if PLANE % 2 == 0:
            return _nibble_float16(words, PLANE, INLINE_ASM).to(tl.float16, bitcast=True) - 1032.0
        else:  # the nibble stays 4 bits up, and a multiplication brings it down
            return _nibble_float16(words, PLANE, INLINE_ASM).to(tl.float16, bitcast=True) * 0.0625 - 72.0
    elif dtype == tl.bfloat16:
        if INLINE_ASM:
            return _nibble_bfloat16(words, PLANE).to(tl.bfloat16, bitcast=True)
        else:
            return (((words >> (4 * PLANE)) & 0xF) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    else:
        return (((words >> (4 * PLANE)) & 0xF) - 8).to(dtype)


@triton.jit
def int8_plane(words, PLANE: tl.constexpr, dtype: tl.constexpr, INLINE_ASM: tl.constexpr):
    """Byte PLANE of each int16 word, minus 128, as dtype."""
    if dtype == tl.float16:
        return _byte_float16(words, PLANE, INLINE_ASM).to(tl.float16, bitcast=True) - 1152.0
    elif dtype == tl.bfloat16 and INLINE_ASM:
        return _byte_bfloat16(words, PLANE).to(tl.bfloat16, bitcast=True)
    else:
        return (((words >> (8 * PLANE)) & 0xFF) - 128).to(tl.float32).to(dtype)


@triton.jit
def _on_pairs(words, TEXT: tl.constexpr):
    """Inline PTX from two words in $1 to two 16-bit results in $0."""
    return tl.inline_asm_elementwise(TEXT, "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2)


@triton.jit
def _nibble_float16(words, PLANE: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The bits of 1024 + nibble (even planes) or of 1024 + 16 * nibble (odd ones)."""
    if not INLINE_ASM:
        return ((words >> (PLANE // 2 * 8)) & (0xF << (PLANE % 2 * 4))) | 0x6400
    elif PLANE == 0:
        return _on_pairs(words, "lop3.b32 $0, $1, 0x000F000F, 0x64006400, 0xEA;")  # 0xEA: (a & b) | c
    elif PLANE == 1:
        return _on_pairs(words, "lop3.b32 $0, $1, 0x00F000F0, 0x64006400, 0xEA;")
    elif PLANE == 2:
        return _on_pairs(words, "{ .reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x000F000F, 0x64006400, 0xEA; }")
    else:
        return _on_pairs(words, "{ .reg .b32 t; shr.u32 t, $1, 8; lop3.b32 $0, t, 0x00F000F0, 0x64006400, 0xEA; }")


@triton.jit
def _nibble_bfloat16(words, PLANE: tl.constexpr):
    """The bits of (128 + nibble) * 1 - 136."""
    if PLANE == 0:
        return _on_pairs(
            words,
            "{ .reg .b32 t, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308;"
            " lop3.b32 t, $1, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, less; }",
        )
    elif PLANE == 1:
        return _on_pairs(
            words,
            "{ .reg .b32 t, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; shr.u32 t, $1, 4;"
            " lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, less; }",
        )
    elif PLANE == 2:
        return _on_pairs(
            words,
            "{ .reg .b32 t, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; shr.u32 t, $1, 8;"
            " lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, less; }",
        )
    else:
        return _on_pairs(
            words,
            "{ .reg .b32 t, one, less; mov.b32 one, 0x3F803F80; mov.b32 less, 0xC308C308; shr.u32 t, $1, 12;"
            " lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, less; }",
        )


@triton.jit
def _byte_float16(words, PLANE: tl.constexpr, INLINE_ASM: tl.constexpr):
    """The bits of 1024 + byte. prmt picks bytes (0 and 2, or 1 and 3) and puts 0x64 above each."""
    if not INLINE_ASM:
        return ((words >> (8 * PLANE)) & 0xFF) | 0x6400
    elif PLANE == 0:
        return _on_pairs(words, "{ .reg .b32 m; mov.b32 m, 0x64646464; prmt.b32 $0, $1, m, 0x4240; }")
    else:
        return _on_pairs(words, "{ .reg .b32 m; mov.b32 m, 0x64646464; prmt.b32 $0, $1, m, 0x4341; }")


@triton.jit
def _byte_bfloat16(words, PLANE: tl.constexpr):
    """The bits of byte - 128, from its nibbles: ((128 + high) * 16 - 2176) + ((128 + low) - 128)."""
    if PLANE == 0:
        return _on_pairs(
            words,
            "{ .reg .b32 low, high, one, c; mov.b32 one, 0x3F803F80; shr.u32 high, $1, 4;"
            " lop3.b32 low, $1, 0x000F000F, 0x43004300, 0xEA; lop3.b32 high, high, 0x000F000F, 0x43004300, 0xEA;"
            " mov.b32 c, 0xC300C300; fma.rn.bf16x2 low, low, one, c;"
            " mov.b32 c, 0xC508C508; mov.b32 $0, 0x41804180; fma.rn.bf16x2 high, high, $0, c;"
            " fma.rn.bf16x2 $0, high, one, low; }",
        )
    else:
        return _on_pairs(
            words,
            "{ .reg .b32 low, high, one, c; mov.b32 one, 0x3F803F80; shr.u32 low, $1, 8; shr.u32 high, $1, 12;"
            " lop3.b32 low, low, 0x000F000F, 0x43004300, 0xEA; lop3.b32 high, high, 0x000F000F, 0x43004300, 0xEA;"
            " mov.b32 c, 0xC300C300; fma.rn.bf16x2 low, low, one, c;"
            " mov.b32 c, 0xC508C508; mov.b32 $0, 0x41804180; fma.rn.bf16x2 high, high, $0, c;"
            " fma.rn.bf16x2 $0, high, one, low; }",
        )
