# mypy: ignore-errors
"""The noise of `headrace.kernels.philox` on the device: the same counters, the same words, in float32."""

import triton
import triton.language as tl


@triton.jit
def philox_words(counter, position, key_low, key_high):
    """Philox4x32-10 (Salmon et al. 2011) of the counters (counter, position, 0, 0): four uint32 of counter's shape.

    counter: uint32. position, key_low, key_high: uint32 that broadcast over it.
    """
    c0 = counter
    c1 = tl.zeros_like(counter) + position
    c2 = tl.zeros_like(counter)
    c3 = tl.zeros_like(counter)
    k0 = tl.zeros_like(counter) + key_low
    k1 = tl.zeros_like(counter) + key_high
    for _ in tl.static_range(10):
        low_0, high_0 = c0 * 0xD2511F53, tl.umulhi(c0, 0xD2511F53)
        low_2, high_2 = c2 * 0xCD9E8D57, tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, low_2, high_0 ^ c3 ^ k1, low_0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def gumbel(first_token, position, key_low, key_high, SIZE: tl.constexpr):
    """Standard Gumbel noise, float32 [SIZE], of the tokens first_token .. first_token + SIZE - 1.

    first_token and SIZE: multiples of 4 (the four words of a counter belong to four tokens in a row).
    """
    counter = (first_token // 4 + tl.arange(0, SIZE // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(counter, position, key_low, key_high)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (SIZE,))
    return gumbel_of(words)


@triton.jit
def gumbel_of(words):
    """-log(-log(u)) of u = (word + 0.5) / 2^32, to float32's last places for every word.

    Near 1, u has no room in float32, but v = 1 - u, which comes from the word's complement, has: there
    -log(u) = -log1p(-v) = -log(w) * v / (1 - w) with w = 1 - v rounded (Kahan; Goldberg 1991, theorem 4).
    """
    is_high = words >= 0x80000000
    v = (tl.where(is_high, words ^ 0xFFFFFFFF, words).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    w = 1.0 - v
    lost = 1.0 - w
    correction = tl.where(lost > 0.0, v / tl.where(lost > 0.0, lost, 1.0), 1.0)
    exponential = -tl.log(tl.where(is_high, w, v)) * tl.where(is_high, correction, 1.0)
    exponential = tl.where(is_high & (lost == 0.0), v, exponential)
    return -tl.log(exponential)
