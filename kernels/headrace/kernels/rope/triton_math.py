# mypy: ignore-errors
"""Device functions of the rotary embedding, shared by `rope/triton.py` and the epilogue of the qkv product
(`headrace.kernels.linear.triton`), so that both store the same bits.

A tile of heads is float32 [M, NUM_HEADS * HEAD_DIM]: M rows (tokens), heads side by side, both constants powers of two.
"""

import triton
import triton.language as tl
from headrace.kernels.triton_convert import convert


@triton.jit
def cos_sin(angle):
    """cos and sin of float32 angles of any shape, |angle| up to 2^20 radians, within 2e-7 of the true values.

    tl.cos would do, but keeps a table walk for huge angles that costs local memory. Here the angle loses k * pi / 2
    (Cody & Waite 1980): pi / 2 is cut into pieces of 12 bits and k into two of 10, so that the large products are
    exact with and without fused multiply-add. The polynomials for |r| <= pi / 4 are Cephes' sinf and cosf (Moshier).
    """
    k = ((angle * 0.63661977236758134) + 12582912.0) - 12582912.0  # adding 1.5 * 2^23 rounds to the nearest integer
    k_high = (((k * 0.0009765625) + 12582912.0) - 12582912.0) * 1024.0
    k_low = k - k_high
    r = (angle - k_high * 1.57080078125) - k_low * 1.57080078125
    r = (r + k_high * 4.453584551811218e-06) + k_low * 4.453584551811218e-06
    r += k * 8.706138032721356e-10
    z = r * r
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * r + r
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    quadrant = k.to(tl.int32) & 3
    is_odd = (quadrant & 1) == 1
    cos_value = tl.where(is_odd, sine, cosine)
    sin_value = tl.where(is_odd, cosine, sine)
    cos_value = tl.where((quadrant == 1) | (quadrant == 2), -cos_value, cos_value)
    sin_value = tl.where(quadrant >= 2, -sin_value, sin_value)
    return cos_value, sin_value


@triton.jit
def rope_angles(position, inv_freq, attention_factor):
    """cos and sin, each float32 [M, half], of int32 positions [M] and float32 inv_freq [half].

    The angle is position * inv_freq rounded to float32, as the reference has it; positions below 2^24 are exact.
    """
    cos_value, sin_value = cos_sin(position.to(tl.float32)[:, None] * inv_freq[None, :])
    return cos_value * attention_factor, sin_value * attention_factor


@triton.jit
def norm_heads(x, weight, eps, M: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """QK-norm: each head of the tile x divided by its root mean square, times float32 weight [HEAD_DIM]."""
    heads = tl.reshape(x, (M, NUM_HEADS, HEAD_DIM))
    scale = tl.rsqrt(tl.sum(heads * heads, axis=2) / HEAD_DIM + eps)
    heads = heads * scale[:, :, None] * weight[None, None, :]
    return tl.reshape(heads, (M, NUM_HEADS * HEAD_DIM))


@triton.jit
def rotate_heads(x, cos_value, sin_value, M: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Turn the pairs (i, i + HEAD_DIM / 2) of each head of the tile x by cos and sin [M, HEAD_DIM / 2]."""
    HALF: tl.constexpr = HEAD_DIM // 2
    pairs = tl.permute(tl.reshape(x, (M, NUM_HEADS, 2, HALF)), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    turned = rotate(first, second, cos_value[:, None, :], sin_value[:, None, :])
    pairs = tl.permute(tl.join(turned[0], turned[1]), (0, 1, 3, 2))
    return tl.reshape(pairs, (M, NUM_HEADS * HEAD_DIM))


@triton.jit
def rotate(first, second, cos_value, sin_value):
    """The halves form (Su et al. 2021): the turned first and second halves."""
    return first * cos_value - second * sin_value, second * cos_value + first * sin_value


@triton.jit
def slot_offset(slot, BLOCK_SIZE: tl.constexpr, stride_block, stride_slot):
    """Elements, int64, from the start of a cache [blocks, heads, BLOCK_SIZE, head_dim] to `slot` of head 0."""
    return (slot // BLOCK_SIZE).to(tl.int64) * stride_block + slot % BLOCK_SIZE * stride_slot


@triton.jit
def to_cache(x, inverse_scale, dtype: tl.constexpr):
    """float32 keys or values as they are kept: x * inverse_scale rounded to a quantised type, plain x in a float one.

    inverse_scale broadcasts over x: 1 / the scale of the head; any number where the type is a float.
    """
    if dtype == tl.int8 or dtype == tl.uint8 or dtype == tl.float8e4nv:
        x = x * inverse_scale
    return convert(x, dtype)
