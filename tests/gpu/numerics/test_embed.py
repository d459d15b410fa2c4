"""Embedding lookup from dense and packed tables."""

import numpy as np
import pytest
import torch
from headrace.kernels.embed import embed as reference
from headrace.kernels.embed.triton import embed
from headrace.kernels.linear import pack
from headrace.kernels.linear.pack import make_rowwise
from headrace.kernels.quant import QuantTensor, pack_int4

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {SINGLE: 1e-6, HALF: 5e-4, BRAIN: 4e-3}  # of the largest value: one rounding to the type of `out`
IDS = [0, 63, 64, 130, 64]  # of 131 rows: both sides of a tile of 64, and the last


def ids_on(device: str) -> torch.Tensor:
    return torch.tensor(IDS, dtype=torch.int32, device=device)


def quantised(kind: str, width: int, group: int, has_zeros: bool) -> QuantTensor:
    rng = np.random.default_rng(group)
    q = rng.integers(0, 16, (131, width)).astype(np.uint8) if kind == "int4" else rng.integers(-128, 128, (131, width))
    scales, zeros = (rng.standard_normal((131, width // group)).astype(np.float16).astype(np.float32) for _ in range(2))
    packed = pack_int4(q.astype(np.uint8)) if kind == "int4" else q.astype(np.int8)
    return QuantTensor("int4" if kind == "int4" else "int8", packed, scales, zeros if has_zeros else scales * -8, group)


def poisoned(width: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Five rows of a wider buffer."""
    return torch.full((len(IDS), width + 8), torch.nan, dtype=dtype, device=device)[:, :width]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 100, 576, 1500])
def test_dense(width: int, dtype: torch.dtype, device: str) -> None:
    table, out = torch.randn(131, width).to(dtype), poisoned(width, dtype, device)
    embed(ids_on(device), table.to(device), 1.0, out)
    assert torch.equal(out.cpu(), table[IDS])
    embed(ids_on(device), table.to(device), 2.5, out)
    assert torch.equal(out.cpu(), reference(torch.tensor(IDS), table.float(), 2.5).to(dtype))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_packed(kind: str, group: int, has_zeros: bool, dtype: torch.dtype, device: str) -> None:
    table = quantised(kind, 3 * max(group, 64), group, has_zeros)
    out = poisoned(table.shape[1], dtype, device)
    embed(ids_on(device), pack([table], dtype=dtype).to(device), 1.5, out)
    want = torch.from_numpy(table.dequantize())[IDS].double() * 1.5
    assert ((out.cpu().double() - want).abs() <= TOLERANCE[dtype] * want.abs().amax()).all()


def test_packed_symmetric_int8(device: str) -> None:
    table = quantised("int8", 96, 32, True)
    table = QuantTensor("int8", table.packed, table.scales, None, 32)
    out = poisoned(96, SINGLE, device)
    packed = pack([table], dtype=SINGLE)
    assert "zeros" not in packed.tensors
    embed(ids_on(device), packed.to(device), 1.0, out)
    torch.testing.assert_close(out.cpu(), torch.from_numpy(table.dequantize())[IDS], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dtype"), [("w8a8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_rows_with_a_scale(kind: str, dtype: torch.dtype, device: str) -> None:
    weight, scales = (torch.randn(131, 96) * 50).to(dtype), torch.rand(131) + 0.1
    table = make_rowwise(kind, weight, scales, (131,), HALF, is_gated=False)  # type: ignore[arg-type]
    out = poisoned(96, SINGLE, device)
    embed(ids_on(device), table.to(device), 2.0, out)
    torch.testing.assert_close(out.cpu(), (weight.float() * scales[:, None])[IDS] * 2, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("is_packed", [False, True])
def test_an_unknown_id_shows_as_nan(is_packed: bool, device: str) -> None:
    table = quantised("int4", 64, 32, True)
    dense = torch.from_numpy(table.dequantize()).to(device)
    out = torch.zeros((4, 64), device=device)
    ids = torch.tensor([-1, 131, 130, 2**31 - 1], dtype=torch.int32, device=device)
    embed(ids, pack([table], dtype=SINGLE).to(device) if is_packed else dense, 1.0, out)
    assert out.isnan().all(1).tolist() == [True, True, False, True]


def test_what_does_not_fit_is_refused(device: str) -> None:
    table, ids = torch.zeros(10, 32, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    gated = pack([torch.zeros(8, 32), torch.zeros(8, 32)], dtype=HALF, is_gated=True).to(device)
    for wrong in (
        lambda: embed(ids.long(), table, 1.0, torch.zeros(2, 32, device=device)),
        lambda: embed(ids, table, 1.0, torch.zeros(3, 32, device=device)),
        lambda: embed(ids, table, 1.0, torch.zeros(2, 31, device=device)),
        lambda: embed(ids, table.T, 1.0, torch.zeros(2, 10, device=device)),
        lambda: embed(ids, gated, 1.0, torch.zeros(2, 32, device=device)),
    ):
        with pytest.raises(ValueError, match="embed"):
            wrong()
    embed(ids[:0], table, 1.0, torch.zeros(0, 32, device=device))
