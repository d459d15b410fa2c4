"""Weights and KV blocks are asked for once: bytes requested over bytes unique, at most 1.05 (interpreter only).

A step is as fast as its bytes. A kernel that loads a packed word once per nibble, or a KV head once per query head,
computes the right numbers at a fraction of the speed; this is where it is seen.
"""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.linear import pack
from headrace.kernels.linear.triton import linear
from headrace.kernels.linear.triton import workspace_bytes as linear_workspace
from headrace.kernels.paged_attention import AttentionConfig
from headrace.kernels.paged_attention.triton import paged_attention, workspace_bytes
from headrace.kernels.quant import QuantTensor, pack_int4

from tests.gpu.machine import IS_INTERPRETED

if not IS_INTERPRETED:
    pytest.skip("bytes are counted by the interpreter only", allow_module_level=True)

import numpy as np

from tests.gpu.interpreter.sanitizer import Traffic, traffic

MOST = 1.05


def merged(counts: dict[tuple[str, str, str], Traffic], *, kernel: str, least_bytes: int) -> dict[str, Traffic]:
    """Loads of the arguments of a kernel that are at least so large."""
    return {
        argument: count
        for (name, argument, kind), count in counts.items()
        if name == kernel and kind == "load" and count.unique >= least_bytes
    }


def quantized(kind: str, n: int, k: int, group: int) -> QuantTensor:
    rng = np.random.default_rng(0)
    q = rng.integers(0, 16, (n, k)) if kind == "int4" else rng.integers(-127, 128, (n, k))
    packed = pack_int4(q.astype(np.uint8)) if kind == "int4" else q.astype(np.int8)
    scales = rng.random((n, k // group), dtype=np.float32).astype(np.float16).astype(np.float32)
    return QuantTensor(kind=kind, packed=packed, scales=scales, zeros=None, group_size=group)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("int4", 128), ("int8", 32), ("dense", 0)])
def test_a_product_of_few_rows_loads_every_weight_once(kind: str, group: int, rows: int, device: str) -> None:
    n, k = 128, 512
    source = torch.randn(n, k) if kind == "dense" else quantized(kind, n, k, group)
    weight = pack([source], dtype=torch.float16)
    x, out = torch.randn(rows, k).half(), torch.empty(rows, n, dtype=torch.float16)
    workspace = torch.zeros(linear_workspace(weight, rows), dtype=torch.uint8)
    with traffic() as counts:
        linear(x, weight, out, workspace=workspace)
    kernel = "direct_kernel" if kind == "dense" else "packed_kernel"
    for name, tensor in weight.tensors.items():  # the kernels' arguments are named alike
        count = counts[kernel, name, "load"]
        assert count.unique >= 0.9 * tensor.numel() * tensor.element_size(), f"{name}: {count}"
        assert count.amplification <= MOST, f"{name}: {count}"


@pytest.mark.parametrize("kv", [torch.float16, torch.int8])
@pytest.mark.parametrize("group", [1, 4])
def test_decode_loads_every_key_and_value_once(group: int, kv: torch.dtype, device: str) -> None:
    kv_heads, head_dim, block, lengths = 2, 64, 64, (320, 64, 200)
    heads, seqs = kv_heads * group, len(lengths)
    blocks = [-(-length // block) for length in lengths]
    caches = [torch.randn(sum(blocks) + 1, kv_heads, block, head_dim).to(kv) for _ in "kv"]
    tables = torch.zeros(seqs, max(blocks), dtype=torch.int32)
    for row, count in enumerate(blocks):
        tables[row, :count] = torch.arange(count) + sum(blocks[:row])
    config = AttentionConfig(split=128)
    need = workspace_bytes(
        num_seqs=seqs, max_query_len=1, max_seq_len=max(lengths), num_heads=heads, group=group, head_dim=head_dim,
        config=config,
    )  # fmt: skip
    q = torch.randn(seqs, heads, head_dim).half()
    scale = None if kv == torch.float16 else torch.ones(kv_heads)
    with traffic() as counts:
        paged_attention(
            q, *caches, torch.empty_like(q),
            cu_seqlens_q=torch.arange(seqs + 1, dtype=torch.int32), seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=tables, num_seqs=seqs, max_query_len=1, max_seq_len=max(lengths), scale=0.125,
            k_scale=scale, v_scale=scale, workspace=torch.empty(need, dtype=torch.uint8), config=config,
        )  # fmt: skip
    of_one = sum(lengths) * kv_heads * head_dim * kv.itemsize
    loads = merged(counts, kernel="split_kernel", least_bytes=of_one)
    assert len(loads) == 2, f"keys and values among {counts}"
    for name, count in loads.items():
        assert count.amplification <= MOST, f"{name}: {count}"
        # Nothing past a sequence's end but the rest of its last tile.
        assert count.requested <= sum(blocks) * block * kv_heads * head_dim * kv.itemsize, f"{name}: {count}"
