"""Paged attention in Triton against float64, for batches that mix prefill chunks, decode and verification rows."""

import pytest
import torch
from tests.gpu.numerics.attention_case import Shape, check, run, sequence

# (length, rows): one position; around a block of 16; around a split of 64; many splits; verification; chunks; a prompt.
RAGGED = [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (65, 1), (130, 1), (70, 5), (90, 40), (33, 33)]
SHAPES = {
    "float32": Shape(),
    "float16": Shape(dtype=torch.float16),
    "bfloat16": Shape(dtype=torch.bfloat16),
    "soft cap": Shape(soft_cap=5.0),
    "window": Shape(window=21),
    "head_dim 80": Shape(head_dim=80),
    "group 3": Shape(heads=6),
}


@pytest.mark.parametrize("name", SHAPES)
def test_mixed_batch(name: str, device: str) -> None:
    shape = SHAPES[name]
    sequences = [sequence(shape, length, rows, seed) for seed, (length, rows) in enumerate(RAGGED)]
    check(shape, sequences, run(shape, sequences, device, pad_seqs=1))
