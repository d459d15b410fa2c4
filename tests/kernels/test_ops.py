"""The small ops against loops over Python floats."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from headrace.kernels.activation import gated_activation, soft_cap
from headrace.kernels.embed import embed
from headrace.kernels.kv_blocks import copy_blocks, gather_blocks, scatter_blocks
from headrace.kernels.linear import linear
from headrace.kernels.rms_norm import rms_norm
from headrace.kernels.rope import rope, rope_table

RNG = np.random.default_rng(9)


def random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(("rows", "width", "group"), [(1, 7, 7), (5, 12, 4), (3, 6, 6), (2, 9, 3)])
def test_rms_norm_of_rows_and_of_heads(rows: int, width: int, group: int) -> None:
    x, weight, eps = random(rows, width) * 0.05, random(group), 1e-3  # small x: a misplaced eps shows
    got = rms_norm(x, weight, eps)
    for t in range(rows):
        for first in range(0, width, group):
            values = x[t, first : first + group].double()
            scale = math.sqrt(sum(float(v) ** 2 for v in values) / group + eps)
            want = [float(v) / scale * float(w) for v, w in zip(values, weight, strict=True)]
            assert got[t, first : first + group].tolist() == pytest.approx(want, rel=1e-5)


def test_rope_turns_halves_of_every_head_by_position_times_frequency() -> None:
    positions, inv_freq, factor = [0, 3, 8191], [1.0, 0.1, 0.0013], 1.25
    x = random(3, 2 * 6)  # two heads of three pairs
    table = rope_table(torch.tensor(positions, dtype=torch.float32), torch.tensor(inv_freq), factor)
    got = rope(x, table)
    for t, position in enumerate(positions):
        for head in range(2):
            for i, freq in enumerate(inv_freq):
                angle = float(np.float32(position) * np.float32(freq))
                a, b = float(x[t, head * 6 + i]), float(x[t, head * 6 + 3 + i])
                want_a = factor * (a * math.cos(angle) - b * math.sin(angle))
                want_b = factor * (b * math.cos(angle) + a * math.sin(angle))
                assert float(got[t, head * 6 + i]) == pytest.approx(want_a, rel=1e-4, abs=1e-5)
                assert float(got[t, head * 6 + 3 + i]) == pytest.approx(want_b, rel=1e-4, abs=1e-5)


def test_gated_activations() -> None:
    gate, up = random(3, 5) * 3, random(3, 5)
    silu = gated_activation(gate.clone(), up, "silu")
    gelu = gated_activation(gate.clone(), up, "gelu_tanh")
    for x, u, s, g in zip(*(t.flatten().tolist() for t in (gate, up, silu, gelu)), strict=True):
        assert s == pytest.approx(x / (1 + math.exp(-x)) * u, rel=1e-5, abs=1e-6)
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        assert g == pytest.approx(0.5 * x * (1 + math.tanh(inner)) * u, rel=1e-5, abs=1e-6)


def test_soft_cap_bends_and_bounds() -> None:
    x = torch.tensor([[-1000.0, -3.0, 0.0, 0.5, 40.0]])
    got = soft_cap(x.clone(), 30.0)
    assert got[0].tolist() == pytest.approx([30 * math.tanh(v / 30) for v in x[0].tolist()], rel=1e-6)


def test_embed_and_scale() -> None:
    table = random(10, 4)
    got = embed(torch.tensor([9, 0, 9]), table, 2.5)
    assert torch.equal(got, table[[9, 0, 9]] * 2.5)
    assert torch.equal(embed(torch.tensor([3]), table, 1.0), table[[3]])
    with pytest.raises(IndexError):
        embed(torch.tensor([10]), table, 1.0)


def test_linear_multiplies_by_rows_of_the_weight() -> None:
    x, weight, bias = random(3, 5), random(7, 5), random(7)
    want = [[sum(a * b for a, b in zip(r.tolist(), w.tolist(), strict=True)) for w in weight] for r in x]
    np.testing.assert_allclose(linear(x, weight, None), want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(linear(x, weight, bias), np.array(want) + bias.numpy(), rtol=1e-4, atol=1e-5)


def test_blocks_are_copied_gathered_and_scattered() -> None:
    caches = [random(5, 2, 4), random(5, 2, 4)]
    before = [cache.clone() for cache in caches]
    copy_blocks(caches, torch.tensor([[0, 3], [-1, 2], [4, -1]], dtype=torch.int32))
    for cache, old in zip(caches, before, strict=True):
        assert torch.equal(cache[3], old[0])
        assert torch.equal(cache[[0, 1, 2, 4]], old[[0, 1, 2, 4]])
    staging = gather_blocks(caches, torch.tensor([4, -1, 1], dtype=torch.int32))
    assert staging.shape == (3, 2, 2 * 4 * 4)
    assert torch.equal(staging[0, 1].view(torch.float32), caches[1][4].flatten())
    scatter_blocks(caches, torch.tensor([2, 0, -1], dtype=torch.int32), staging)
    assert all(torch.equal(cache[2], cache[4]) for cache in caches)
    assert all((cache[0] == 0).all() for cache in caches)  # what -1 gathered


def test_ops_import_no_triton_and_sampling_no_torch() -> None:
    ops = ("activation", "embed", "kv_blocks", "linear", "paged_attention", "rms_norm", "rope")
    code = (
        "import sys, headrace.kernels.sample\n"
        "assert 'torch' not in sys.modules, 'sample imports torch'\n"
        f"for op in {ops}: __import__('headrace.kernels.' + op)\n"
        "assert 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
