"""What the kernels' tests must cover, item by item, held against the cases that they are parametrised with.

A list of names is no proof that a test is a good one, but it is one that nobody drops a case from unseen. Below it:
poison in outputs and in memory of nobody is noticed. One machine is enough for either (interpreter only).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.gpu.numerics import (
    attention_case,
    linear_case,
    test_embed,
    test_linear,
    test_linear_heads,
    test_linear_quantized,
    test_paged_attention,
    test_paged_attention_edges,
    test_paged_attention_invariance,
    test_paged_attention_types,
    test_rms_norm,
    test_rope,
)

FLOATS = {torch.float16, torch.bfloat16, torch.float32}
E4M3 = {torch.float8_e4m3fn, torch.uint8}


def values(module: ModuleType, test: str, name: str) -> set[Any]:
    """What a test is parametrised with under a name."""

    def found() -> Iterator[Any]:
        for mark in getattr(module, test).pytestmark:
            if mark.name != "parametrize":
                continue
            names = mark.args[0] if not isinstance(mark.args[0], str) else [n.strip() for n in mark.args[0].split(",")]
            if name in names:
                at = list(names).index(name)
                yield from (value if len(names) == 1 else value[at] for value in mark.args[1])

    result = set(found())
    assert result, f"{module.__name__}.{test} has no parameter {name}"
    return result


def test_every_quantisation_of_weights() -> None:
    for test, groups in (("test_int4", {32, 64, 128}), ("test_int8", {32, 128})):
        assert values(test_linear, test, "group") >= groups
        assert values(test_linear, test, "dtype") == FLOATS
    assert values(test_linear, "test_int4", "zeros") == {"any", "centre"}  # -8 * scale packs as without zeros
    assert values(test_linear, "test_int8", "zeros") == {"any", "none"}
    assert values(test_linear, "test_dense", "dtype") == FLOATS
    assert values(test_linear_quantized, "test_quantized_rows", "kind") == {"w8a8", "fp8", "fp8_block"}
    assert values(test_embed, "test_packed", "kind") == {"int4", "int8"}
    assert values(test_embed, "test_rows_with_a_scale", "kind") == {"w8a8", "fp8"}


def test_ragged_sizes_of_products() -> None:
    rows = values(test_linear, "test_any_number_of_rows", "m")
    assert {1, 15, 16, 17} <= rows
    assert max(rows) > 64  # the tiles of many rows
    columns = values(test_linear, "test_any_number_of_columns", "rows")
    assert {1, 31, 65, 129} <= columns
    assert values(test_linear_quantized, "test_quantized_rows", "m") >= {1, 17, 65}


def test_what_is_fused_with_a_product() -> None:
    for name in ("norm", "bias", "residual"):
        assert values(test_linear, "test_all_that_is_fused", name) == {False, True}
    assert values(test_linear, "test_all_that_is_fused", "activation") == {None, "silu", "gelu_tanh"}
    assert values(test_linear_heads, "test_caches", "cache") >= {torch.float16, torch.int8} | E4M3
    assert values(test_linear_heads, "test_heads", "head_dim") >= {64, 128, 256}


def test_shapes_of_attention() -> None:
    shapes = list(test_paged_attention.SHAPES.values())
    assert {shape.heads // shape.kv_heads for shape in shapes} >= {1, 3, 4, 8}
    assert {shape.head_dim for shape in shapes} >= {64, 80, 96, 128, 256}
    assert {shape.dtype for shape in shapes} == FLOATS
    assert {shape.kv for shape in shapes} >= {None, torch.int8} | E4M3
    assert any(shape.window and shape.soft_cap and shape.kv is not None for shape in shapes)
    lengths = {length for length, _ in test_paged_attention.RAGGED}
    assert {1, 15, 16, 17} <= lengths  # a block of 16 and its neighbours
    assert {64, 65} <= lengths  # a split of 64
    assert {rows for _, rows in test_paged_attention.RAGGED} >= {1, 5, 34, 37}  # decode, verification, prompt, chunk
    dtypes = values(test_paged_attention_types, "test_every_cache_beside_every_type", "dtype")
    assert dtypes == values(test_paged_attention_types, "test_large_scores", "dtype") == FLOATS
    assert values(test_paged_attention_types, "test_every_cache_beside_every_type", "kv") == {torch.int8} | E4M3


def test_edges_of_window_and_soft_cap() -> None:
    test = "test_window_and_soft_cap_edges"
    assert values(test_paged_attention_edges, test, "window") >= {1, 2, 16, 17, 63, 64, 65}
    assert {bool(cap) for cap in values(test_paged_attention_edges, test, "soft_cap")} == {False, True}
    assert values(test_paged_attention_edges, "test_block_sizes", "block_size") == {16, 32, 64, 128}


def test_types_of_the_smaller_kernels() -> None:
    for module, test in (
        (test_embed, "test_dense"),
        (test_rope, "test_q_is_turned_and_k_and_v_are_written"),
        (test_rope, "test_eight_bit_caches"),
    ):
        assert values(module, test, "dtype") == FLOATS
    assert values(test_rope, "test_eight_bit_caches", "kv") >= {torch.int8} | E4M3
    assert set(test_rms_norm.TOLERANCE) == FLOATS


def test_batch_invariance() -> None:
    assert {"int4", "int4 gated", "int8", "dense"} <= set(test_linear.INVARIANT)
    shapes = [shape for shape in vars(test_paged_attention_invariance).values() if hasattr(shape, "kv_heads")]
    assert any(shape.window for shape in shapes)
    assert any(shape.kv is not None for shape in shapes)
    for module in (test_linear, test_linear_quantized, test_linear_heads):
        assert hasattr(module, "test_a_row_has_the_same_bits_alone_and_among_neighbours")


def test_an_output_that_nobody_writes_is_noticed(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Outputs hold NaN before the call."""
    monkeypatch.setattr(linear_case, "linear", lambda *args, **kwargs: None)
    case = test_linear.INVARIANT["dense"]()
    assert case.run(case.rows(2, device)).isnan().all()
    monkeypatch.setattr(attention_case, "paged_attention", lambda *args, **kwargs: None)
    shape = attention_case.Shape()
    (out,) = attention_case.run(shape, [attention_case.sequence(shape, 20, 2, 0)], device)
    assert out.isnan().all()


@pytest.mark.parametrize("beyond", [1, 12])
def test_a_key_of_nobody_is_noticed(beyond: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Slots behind a sequence's end and blocks of nobody hold NaN: reading one position too many shows."""
    attend = attention_case.paged_attention

    def reads_beyond(*args: Any, seq_lens: torch.Tensor, max_seq_len: int, **kwargs: Any) -> None:
        attend(*args, seq_lens=seq_lens + beyond, max_seq_len=max_seq_len + beyond, **kwargs)

    monkeypatch.setattr(attention_case, "paged_attention", reads_beyond)
    shape = attention_case.Shape()
    (out,) = attention_case.run(shape, [attention_case.sequence(shape, 30, 1, 0)], device)
    assert out.isnan().all()
