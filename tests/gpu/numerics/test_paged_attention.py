"""Paged attention in Triton against float64, for batches that mix prefill chunks, decode and verification rows."""

import pytest
import torch

from tests.gpu.numerics.attention_case import Shape, check, run, sequence

# (length, rows): one position; around a block of 16 and a split of 64; several splits; verification over the boundary
# of a split; chunks at a sequence's start and inside it; a prompt.
RAGGED = [(1, 1), (15, 1), (16, 1), (17, 1), (64, 1), (65, 1), (130, 1), (66, 5), (150, 37), (34, 34)]
SHAPES = {
    "float32": Shape(),
    "float16": Shape(dtype=torch.float16),
    "bfloat16": Shape(dtype=torch.bfloat16),
    "soft cap": Shape(soft_cap=5.0),
    "head_dim 16": Shape(head_dim=16, dtype=torch.float16),
    "head_dim 16 beside int8": Shape(head_dim=16, kv=torch.int8),
    "head_dim 80": Shape(head_dim=80),
    "head_dim 96": Shape(head_dim=96, dtype=torch.float16),
    "head_dim 128": Shape(head_dim=128, heads=2, kv_heads=1),
    "head_dim 256": Shape(head_dim=256, heads=2, kv_heads=1, dtype=torch.bfloat16),
    "group 1": Shape(heads=2),
    "group 3": Shape(heads=6),
    "group 4": Shape(heads=4, kv_heads=1),
    "group 8": Shape(heads=8, kv_heads=1),
    "group 32": Shape(heads=32, kv_heads=1),
    "tile of half a block": Shape(block_size=32),
    "float16 beside int8": Shape(dtype=torch.float16, kv=torch.int8),
    "bfloat16 beside e4m3": Shape(dtype=torch.bfloat16, kv=torch.float8_e4m3fn),
    "bfloat16 beside e4m3's bits": Shape(dtype=torch.bfloat16, kv=torch.uint8),
    "float32 beside int8, head_dim 80": Shape(kv=torch.int8, head_dim=80),
    "float32 beside e4m3, window": Shape(kv=torch.float8_e4m3fn, window=20),
    "everything": Shape(heads=6, head_dim=96, window=21, soft_cap=5.0, dtype=torch.bfloat16, kv=torch.int8),
}


@pytest.mark.parametrize("name", SHAPES)
def test_mixed_batch(name: str, device: str) -> None:
    shape = SHAPES[name]
    sequences = [sequence(shape, length, rows, seed) for seed, (length, rows) in enumerate(RAGGED)]
    check(shape, sequences, run(shape, sequences, device, pad_seqs=1))
