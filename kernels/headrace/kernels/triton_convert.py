# mypy: ignore-errors
"""Device functions that round float32 to the types in which activations and the KV cache are kept.

Called by the Triton kernels that write them: `rms_norm/triton.py`, `rope/triton.py`, and the epilogues of
`linear/triton.py`. One place, so that the same value is stored whichever kernel stores it.
"""

import triton
import triton.language as tl

# The largest magnitudes: int8 symmetric; OCP FP8 E4M3 (Micikevicius et al. 2022, table 1).
INT8_MAX = tl.constexpr(127.0)
E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def scale_for(largest, dtype: tl.constexpr):
    """The float32 scale with which values up to `largest` fill a quantised type; never 0. uint8 holds bits of e4m3."""
    if dtype == tl.int8:
        return tl.maximum(largest, 1e-12) / INT8_MAX
    else:
        return tl.maximum(largest, 1e-12) / E4M3_MAX


@triton.jit
def convert(x, dtype: tl.constexpr):
    """float32 x of any shape to `dtype`: to the nearest, ties to even; int8 and e4m3 are saturated.

    NaN becomes NaN in floats and 0 in int8. uint8 gets the bits of e4m3 (sm_80 has no such type).
    """
    if dtype == tl.int8:
        return to_int8(x)
    elif dtype == tl.uint8:
        return to_e4m3_bits(x)
    elif dtype == tl.float8e4nv:
        return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
    else:
        return x.to(dtype)


@triton.jit
def to_int8(x):
    """round(x) in -127..127, ties to even."""
    clamped = tl.minimum(tl.maximum(tl.where(x == x, x, 0.0), -127.0), 127.0)
    # Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds.
    return ((clamped + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def to_e4m3_bits(x):
    """The bits of x in FP8 E4M3 as uint8: sign, 4 bits of exponent (bias 7), 3 of mantissa; 0x7f is NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    normal = magnitude.to(tl.uint32, bitcast=True)
    # Add just under half of the last kept bit, and the kept bit itself to settle ties; then move the bias 127 -> 7.
    normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the step is 2^-9, which is the last place of floats from 2^14 on.
    small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(magnitude < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8)
