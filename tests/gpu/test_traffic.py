"""Weights, scales, keys and values are asked for once: bytes requested over bytes unique, at most 1.05
(interpreter only).

A step is as fast as its bytes. A kernel that loads a packed word once per nibble computes the right numbers at a
fraction of the speed; this is where it is seen. For many rows "once" is once per tile of rows. Keys and values of few
rows: numerics/test_paged_attention_traffic.py.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu.machine import IS_INTERPRETED

if not IS_INTERPRETED:
    # A GPU does not tell what a program asked for; `gates.py` runs this file in the interpreter.
    pytest.skip("bytes are counted by the interpreter only", allow_module_level=True)

from headrace.kernels.linear import PackedLinear, pack
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.quantize import pack_fp8, pack_fp8_block, pack_w8a8
from headrace.kernels.paged_attention import AttentionConfig

from tests.gpu.interpreter.sanitizer import traffic
from tests.gpu.numerics.attention_case import Shape, run, sequence
from tests.gpu.numerics.linear_case import Case, quant
from tests.gpu.numerics.test_linear_heads import batch, heads_case
from tests.gpu.numerics.test_linear_quantized import quantized_rows

MOST = 1.05
N, K = 128, 512
HALF = torch.float16
# kind, group, zeros: everything that a matrix can be packed as.
KINDS = [
    ("int4", 16, "any"), ("int4", 32, "any"), ("int4", 32, "none"), ("int4", 64, "any"), ("int4", 128, "any"),
    ("int4", 128, "none"), ("int8", 16, "any"), ("int8", 32, "none"), ("int8", 128, "any"), ("dense", 0, ""),
    ("w8a8", 0, ""), ("fp8", 0, ""), ("fp8_block", 0, ""),
]  # fmt: skip
ROWWISE = {"w8a8": pack_w8a8, "fp8": pack_fp8, "fp8_block": pack_fp8_block}


def case_of(kind: str, group: int, zeros: str, *, is_gated: bool = False, config: LinearConfig | None = None) -> Case:
    count = 2 if is_gated else 1
    activation = "silu" if is_gated else None
    if kind in ROWWISE:
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(N, K, generator=generator) for _ in range(count)]
        packed = ROWWISE[kind](weights, dtype=HALF, is_gated=is_gated)
    elif kind == "dense":
        packed = pack([torch.randn(N, K) for _ in range(count)], dtype=HALF, is_gated=is_gated)
    else:
        packed = pack([quant(kind, N, K, group, zeros, seed) for seed in range(count)], dtype=HALF, is_gated=is_gated)
    return Case(packed, torch.zeros(0), activation=activation, config=config)


def multiply(case: Case, m: int) -> None:
    """One product of m rows, quantised where the kind asks for it."""
    if case.packed.kind in ROWWISE:
        values, factors, _ = quantized_rows(case, m)
        case.run(values, factors)
    else:
        case.run(case.rows(m, "cpu"))


def assert_read(weight: PackedLinear, counts: object, times: int = 1) -> None:
    """Each tensor of the weight was asked for `times` times, and nothing of it was left out."""
    assert isinstance(counts, dict)
    for name, tensor in weight.tensors.items():
        argument = "w_scale" if name == "scales" and "weight" in weight.tensors else name
        found = [count for (_, given, kind), count in counts.items() if (given, kind) == (argument, "load")]
        size = tensor.numel() * tensor.element_size()
        unique, requested = sum(count.unique for count in found), sum(count.requested for count in found)
        assert unique >= 0.9 * size, f"{name}: {unique} of {size} bytes were read"
        few = (
            size < 0.02 * weight.num_bytes
        )  # one number a row or a block of 128 x 128: beside the weight it is nothing
        assert requested <= MOST * times * unique or few, f"{name}: {requested} bytes asked for, {unique} there"


@pytest.mark.parametrize(("rows", "is_gated"), [(1, True), (5, False)])
@pytest.mark.parametrize(("kind", "group", "zeros"), KINDS)
def test_a_product_of_few_rows_loads_every_weight_once(
    kind: str, group: int, zeros: str, rows: int, is_gated: bool
) -> None:
    case = case_of(kind, group, zeros, is_gated=is_gated)
    with traffic() as counts:
        multiply(case, rows)
    assert_read(case.packed, counts)


@pytest.mark.parametrize(("kind", "group", "zeros"), [KINDS[1], KINDS[4], KINDS[7], *KINDS[9:]])
def test_a_product_of_many_rows_loads_every_weight_once_a_tile(kind: str, group: int, zeros: str) -> None:
    config = LinearConfig(64, 64, 4, 3, split_programs=0)
    case = case_of(kind, group, zeros, config=config)
    with traffic() as counts:
        multiply(case, 130)
    assert_read(case.packed, counts, times=3)


@pytest.mark.parametrize("kind", ["int4", "dense"])
def test_heads_are_multiplied_from_weights_read_once(kind: str) -> None:
    case = heads_case(4, 2, 64, HALF, kind)
    with traffic() as counts:
        case.run(*batch(case, 5, "cpu"))
    assert_read(case.product.packed, counts)


@pytest.mark.parametrize("kv", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize(("head_dim", "window"), [(64, 0), (80, 0), (128, 0), (64, 40)])
def test_a_prefill_reads_keys_and_values_once_a_tile_of_rows(
    head_dim: int, window: int, kv: torch.dtype | None
) -> None:
    """A KV head's tile serves all query heads of its group; a tile of rows reads the tiles of 16 positions that one of
    them sees, and no other. A whole prompt, and a chunk behind a prefix."""
    config = AttentionConfig(block_n=16, split=64, prefill_block_m=32)
    shape = Shape(heads=4, kv_heads=2, head_dim=head_dim, dtype=HALF, kv=kv, window=window, config=config)
    sequences = [sequence(shape, 90, 90, 1), sequence(shape, 150, 60, 2)]
    with traffic() as counts:
        run(shape, sequences, "cpu")
    size = (HALF if kv is None else kv).itemsize * head_dim * shape.kv_heads
    tokens = config.prefill_block_m // (shape.heads // shape.kv_heads)  # of a tile of rows
    needed = 0
    for s in sequences:
        for first in range(s.length - len(s.q), s.length, tokens):
            last = min(first + tokens, s.length)
            lowest = max(first - window + 1, 0) // 16 if window else 0
            needed += (-(-last // 16) - lowest) * 16 * size
    for argument in ("k_ptr", "v_ptr"):
        found = [c for (kernel, name, kind), c in counts.items() if (name, kind) == (argument, "load")]
        assert {kernel for kernel, name, _ in counts if name == argument} == {"prefill_kernel"}
        assert 0.8 * needed <= sum(c.requested for c in found) <= MOST * needed
