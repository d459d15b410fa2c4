"""Weights and their scales are asked for once: bytes requested over bytes unique, at most 1.05 (interpreter only).

A step is as fast as its bytes. A kernel that loads a packed word once per nibble computes the right numbers at a
fraction of the speed; this is where it is seen. Keys and values: numerics/test_paged_attention_traffic.py.
"""

from __future__ import annotations

import pytest
import torch
from headrace.kernels.linear import pack
from headrace.kernels.linear.triton import linear, workspace_bytes
from headrace.kernels.quant import QuantTensor, pack_int4

from tests.gpu.machine import IS_INTERPRETED

if not IS_INTERPRETED:
    # A GPU does not tell what a program asked for; `gates.py` runs this file in the interpreter.
    pytest.skip("bytes are counted by the interpreter only", allow_module_level=True)

import numpy as np

from tests.gpu.interpreter.sanitizer import traffic

MOST = 1.05


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
    workspace = torch.zeros(workspace_bytes(weight, rows), dtype=torch.uint8)
    with traffic() as counts:
        linear(x, weight, out, workspace=workspace)
    kernel = "direct_kernel" if kind == "dense" else "packed_kernel"
    for name, tensor in weight.tensors.items():  # the kernels' arguments are named alike
        count = counts[kernel, name, "load"]
        assert count.unique >= 0.9 * tensor.numel() * tensor.element_size(), f"{name}: {count}"
        assert count.amplification <= MOST, f"{name}: {count}"
