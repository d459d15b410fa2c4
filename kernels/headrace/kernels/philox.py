"""Op: counter-based random numbers, Philox4x32-10, and the Gumbel noise that sampling adds to logits.

Called by `sample/reference.py`. No state: a number is a pure function of (seed, position, token id), so the token
drawn at a position depends on seed and prefix alone, whatever else is in the batch and wherever the sequence runs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC11), table 2 and section 4.3 (Random123).
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], np.uint64)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_32 = np.uint64(32)

# The uniform of 32 bits is (r + 0.5) / 2^32, so the noise -log(-log(u)) is at most this (at r = 2^32 - 1).
MAX_GUMBEL = 22.9


def philox4x32(counter: npt.NDArray[np.uint32], key: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Four random words for each counter.

    counter: uint32 [4, N]. key: two 32-bit integers. Returns uint32 [4, N].
    """
    even, odd = counter[0::2].astype(np.uint64), counter[3::-2].astype(np.uint64)  # words 0, 2 and words 3, 1
    k0, k1 = key
    for _ in range(_ROUNDS):
        products = even * _MULTIPLIERS
        high = products >> _32
        high ^= odd
        high ^= np.array([[k1], [k0]], np.uint64)
        even = high[::-1]
        odd = products
        odd &= _LOW
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack((even[0], odd[1], even[1], odd[0])).astype(np.uint32)


def gumbel(seed: int, position: int, token_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Standard Gumbel noise for tokens that could stand at `position`, float64 of token_ids' shape [N].

    seed: 0..2^64 - 1, the key. The counter is (token_id // 4, position, 0, 0) and word token_id % 4 is used.
    """
    blocks = token_ids >> 2
    first, last = (int(blocks.min()), int(blocks.max())) if len(blocks) else (0, -1)
    key = (seed & 0xFFFFFFFF, seed >> 32)
    if last - first < len(blocks):  # dense: each block once, not once per token of it
        words = philox4x32(_counter(np.arange(first, last + 1), position), key).T.reshape(-1)
        words = words[token_ids - 4 * first]
    else:
        words = philox4x32(_counter(blocks, position), key)[token_ids & 3, np.arange(len(blocks))]
    uniform = (words + 0.5) * 2.0**-32  # in float64: exact, never 0 or 1
    noise: npt.NDArray[np.float64] = -np.log(-np.log(uniform))
    return noise


def _counter(blocks: npt.NDArray[np.int64], position: int) -> npt.NDArray[np.uint32]:
    counter = np.zeros((4, len(blocks)), np.uint32)
    counter[0] = blocks
    counter[1] = position
    return counter
