"""Scores of hundreds in every type, and e4m3 keys and values beside each type that computes with them."""

import pytest
import torch

from tests.gpu.machine import lacks_fp8
from tests.gpu.numerics.attention_case import TOLERANCE, Shape, check, expected, run, sequence

CACHES = [torch.float8_e4m3fn, torch.uint8, torch.int8]


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_cache_beside_every_type(dtype: torch.dtype, kv: torch.dtype, device: str) -> None:
    if kv == torch.float8_e4m3fn and lacks_fp8(device):
        pytest.skip("this GPU knows no fp8: its bits are tested beside it")
    shape = Shape(dtype=dtype, kv=kv)
    sequences = [sequence(shape, length, rows, length) for length, rows in ((1, 1), (66, 5), (150, 37), (34, 34))]
    check(shape, sequences, run(shape, sequences, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores(dtype: torch.dtype, device: str) -> None:
    """Without its maximum a softmax would overflow. A float32 score of s is off by s * 2^-24 for each of a few
    roundings, and its weight by as much: that is the tolerance where it is more than the type's own."""
    shape = Shape(scale=40.0, dtype=dtype)
    sequences = [sequence(shape, length, rows, length) for length, rows in ((70, 1), (80, 50))]
    largest = max(shape.scale * float(s.q.norm(dim=-1).max() * s.k.norm(dim=-1).max()) for s in sequences)
    tolerance = max(TOLERANCE[dtype], 2 * largest * 2**-24)
    assert tolerance < 2e-2
    for s, out in zip(sequences, run(shape, sequences, device), strict=True):
        want = expected(shape, s)
        assert float((out.double() - want).abs().max() / want.abs().max()) <= tolerance
