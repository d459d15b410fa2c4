"""Bytes of KV that attention asks for, against those that there are. Interpreter only: it counts them."""

import pytest
import torch

from tests.gpu.machine import IS_INTERPRETED
from tests.gpu.numerics.attention_case import Shape, run, sequence

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="interpreter only: it alone counts bytes")

MOST = 1.05


@pytest.mark.parametrize("kv", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("rows", [1, 4])
def test_keys_and_values_are_read_once(rows: int, head_dim: int, kv: torch.dtype | None, device: str) -> None:
    """A KV head's tile serves all query heads of its group and all rows of a verification."""
    from tests.gpu.interpreter import sanitizer

    shape = Shape(heads=8, head_dim=head_dim, dtype=torch.float16, kv=kv)
    sequences = [sequence(shape, length, rows, length) for length in (40, 64, 130, 200)]
    with sanitizer.traffic() as counts:
        run(shape, sequences, device)
    size = (torch.float16 if kv is None else kv).itemsize
    for argument in ("k_ptr", "v_ptr"):
        found = [c for (kernel, name, kind), c in counts.items() if name == argument and kind == "load"]
        assert sum(c.requested for c in found) <= MOST * sum(c.unique for c in found)
        # Nothing past head_dim, nothing past the last tile: whole tiles of 16 positions.
        tiles = sum(-(-s.length // 16) for s in sequences)
        assert sum(c.requested for c in found) <= tiles * 16 * shape.kv_heads * head_dim * size
