"""Philox4x32-10 against the published vectors, and the noise made of it."""

import math

import numpy as np
import pytest
from headrace.kernels.philox import MAX_GUMBEL, gumbel, philox4x32

# Random123 1.14, tests/kat_vectors, the lines "philox4x32 10": counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, output: str) -> None:
    counters = np.array([_words(counter), [1, 2, 3, 4]], np.uint32).T  # a neighbour must not matter
    k0, k1 = _words(key)
    assert philox4x32(counters, (k0, k1))[:, 0].tolist() == _words(output)


def test_noise_of_a_token_does_not_depend_on_which_tokens_are_asked_for() -> None:
    dense = gumbel(seed=2**64 - 5, position=70_000, token_ids=np.arange(1001))
    sparse_ids = np.array([997, 3, 512, 5, 4])
    assert gumbel(2**64 - 5, 70_000, sparse_ids).tolist() == dense[sparse_ids].tolist()
    middle = np.arange(301, 411)
    assert gumbel(2**64 - 5, 70_000, middle).tolist() == dense[middle].tolist()


def test_noise_follows_the_words() -> None:
    words = philox4x32(np.array([[7 // 4], [9], [0], [0]], np.uint32), (5, 1))[:, 0]
    uniform = (int(words[7 % 4]) + 0.5) / 2**32
    assert gumbel(5 + (1 << 32), 9, np.array([7]))[0] == pytest.approx(-math.log(-math.log(uniform)), rel=1e-14)


def test_noise_changes_with_every_part_of_its_key() -> None:
    ids = np.arange(8)
    streams = [gumbel(*key, ids).tolist() for key in ((1, 0), (2, 0), (1 << 32, 0), (1, 1))]
    values = [value for stream in streams for value in stream]
    assert len(set(values)) == len(values)


def test_bound_of_the_noise_holds_and_is_tight() -> None:
    largest = -math.log(-math.log((2**32 - 0.5) / 2**32))
    assert largest < MAX_GUMBEL < largest + 0.1


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel(3, 0, np.arange(200_000))
    # Mean: Euler's constant; variance: pi^2 / 6. Tolerances are 5 standard errors.
    assert abs(noise.mean() - 0.5772156649) < 5 * 1.2825 / math.sqrt(200_000)
    assert abs(noise.var() - math.pi**2 / 6) < 0.06
