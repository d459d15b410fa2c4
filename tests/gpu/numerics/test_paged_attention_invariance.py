"""A row's attention depends on its own sequence and position alone: bit for bit. Not on its neighbours, nor on whether
it comes as a decode row, in a verification, in a prefill chunk or behind a prefix hit."""

import pytest
import torch
from headrace.kernels.paged_attention import AttentionConfig

from tests.gpu.numerics.attention_case import Sequence, Shape, run, sequence

SHAPE = Shape(heads=4, kv_heads=1, dtype=torch.float16)
WINDOW = Shape(heads=3, kv_heads=1, window=50, soft_cap=4.0)
BYTES = Shape(heads=2, kv_heads=1, dtype=torch.bfloat16, kv=torch.int8)
PARTS = Shape(heads=2, kv_heads=1, head_dim=80, dtype=torch.bfloat16)
BROAD = Shape(heads=8, kv_heads=1, head_dim=32)


def neighbours(shape: Shape, count: int) -> list[Sequence]:
    """Decode rows of every length, a verification and, from seven on, a prefill chunk."""
    kinds = [((13 * i) % 90 + 1, 1) for i in range(count)]
    kinds[0] = (40, 3)
    if count >= 7:
        kinds[3] = (110, 70)
    return [sequence(shape, length, rows, 100 + i) for i, (length, rows) in enumerate(kinds)]


@pytest.mark.parametrize("shape", [SHAPE, WINDOW, BYTES], ids=["float16", "window", "int8"])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_alone_and_among_others(shape: Shape, rows: int, device: str) -> None:
    """Whichever kernel takes it: decode, verification, prefill."""
    probe = sequence(shape, 150, rows, 1)
    alone = run(shape, [probe], device)[0]
    for count in (1, 7, 64) if rows == 1 and shape is SHAPE else (1, 7):
        others = neighbours(shape, count)
        place = count // 2
        outs = run(shape, [*others[:place], probe, *others[place:]], device, seed=count)
        assert torch.equal(outs[place], alone), f"among {count}"


@pytest.mark.parametrize(
    "shape", [SHAPE, WINDOW, BYTES, PARTS, BROAD], ids=["float16", "window", "int8", "head_dim 80", "float32"]
)
def test_chunks_of_a_prompt(shape: Shape, device: str) -> None:
    """The same bits wherever a chunk began, and whichever kernel its rows get: three splits, all three kernels."""
    whole = sequence(shape, 170, 170, 1)
    want = run(shape, [whole], device)[0]
    chunks = [whole.first(75, 75), whole.first(165, 90), *(whole.last(rows) for rows in (1, 5, 20, 60))]
    chunks += [whole.first(length, 1) for length in (1, 64, 65, 128, 129)]
    for chunk, out in zip(chunks, run(shape, chunks, device), strict=True):
        rows = slice(chunk.length - len(out), chunk.length)
        assert torch.equal(out, want[rows]), f"rows {rows.start} to {rows.stop} of the prompt"


def test_rows_of_a_prefill_tile(device: str) -> None:
    """BLOCK_M and the warps of prefill are free: they do not change a row's bits."""
    outs = []
    for block_m in (64, 128):
        config = AttentionConfig(block_n=16, split=64, prefill_block_m=block_m)
        shape = Shape(heads=2, kv_heads=1, config=config)
        outs.append(run(shape, [sequence(shape, 140, 100, 1)], device)[0])
    assert torch.equal(*outs)
