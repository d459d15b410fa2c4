"""The flash-attn implementation, as far as it can be known without a GPU: arguments, and what it refuses.

The signatures are those of flash-attn 2.8.3 and of flash-attn 4.0.0b36. Calling them needs a GPU: not done yet.
"""

import inspect
from typing import Any

import pytest
import torch
from headrace.kernels.paged_attention import flash

BLOCKS, KV_HEADS, BLOCK, DIM = 5, 2, 16, 64


def flash_2(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any,
    dropout_p: Any = 0.0, softmax_scale: Any = None, causal: Any = False, window_size: Any = (-1, -1),
    softcap: Any = 0.0, alibi_slopes: Any = None, deterministic: Any = False, return_attn_probs: Any = False,
    block_table: Any = None,
) -> None: ...  # fmt: skip


def flash_4(
    q: Any, k: Any, v: Any, qv: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None,
    max_seqlen_q: Any = None, max_seqlen_k: Any = None, min_seqlen_k: Any = None, seqused_q: Any = None,
    seqused_k: Any = None, gather_kv_indices: Any = None, page_table: Any = None, softmax_scale: Any = None,
    causal: Any = False, window_size: Any = (None, None), learnable_sink: Any = None, softcap: Any = 0.0,
    num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False,
) -> None: ...  # fmt: skip


SIGNATURES = {flash.CLASSIC: flash_2, flash.CUTE: flash_4}


def arguments(library: str, window: int = 0) -> dict[str, Any]:
    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, DIM, dtype=torch.bfloat16)
    mapped = flash.varlen_arguments(
        library,
        torch.zeros(4, 8, DIM, dtype=torch.bfloat16),
        cache,
        cache,
        cu_seqlens_q=torch.tensor([0, 1, 4], dtype=torch.int32),
        seq_lens=torch.tensor([9, 20], dtype=torch.int32),
        block_tables=torch.zeros(2, 3, dtype=torch.int32),
        max_query_len=3,
        max_seq_len=20,
        scale=0.125,
        window=window,
        soft_cap=30.0,
    )
    return inspect.signature(SIGNATURES[library]).bind(**mapped).arguments


@pytest.mark.parametrize("library", SIGNATURES)
def test_arguments_fit_the_signature(library: str) -> None:
    bound = arguments(library)
    assert bound["causal"] is True
    assert (bound["softmax_scale"], bound["softcap"]) == (0.125, 30.0)
    assert (bound["max_seqlen_q"], bound["max_seqlen_k"]) == (3, 20)


@pytest.mark.parametrize("library", SIGNATURES)
def test_the_cache_is_a_view_with_slots_before_heads(library: str) -> None:
    k = arguments(library)["k"]
    assert k.shape == (BLOCKS, BLOCK, KV_HEADS, DIM)
    assert k.stride() == (KV_HEADS * BLOCK * DIM, DIM, BLOCK * DIM, 1)


def test_windows_count_the_query_here_but_not_there() -> None:
    assert arguments(flash.CLASSIC)["window_size"] == (-1, -1)
    assert arguments(flash.CLASSIC, window=7)["window_size"] == (6, 0)
    assert arguments(flash.CUTE)["window_size"] == (None, None)
    assert arguments(flash.CUTE, window=7)["window_size"] == (6, 0)


def test_lengths_of_keys() -> None:
    ends = arguments(flash.CLASSIC)["cu_seqlens_k"]
    assert (ends.dtype, ends.tolist()) == (torch.int32, [0, 9, 29])
    assert arguments(flash.CUTE)["seqused_k"].tolist() == [9, 20]


def test_says_which_library_is_missing_and_why() -> None:
    reasons = flash.is_available()
    if not reasons:
        pytest.skip("flash-attn is installed")
    assert [reason.split(":")[0] for reason in reasons] == [flash.CUTE, flash.CLASSIC]


@pytest.mark.parametrize(("dtype", "scales"), [(torch.int8, True), (torch.float32, False), (torch.bfloat16, True)])
def test_refuses_what_the_libraries_cannot_read(dtype: torch.dtype, scales: bool) -> None:
    cache = torch.zeros(BLOCKS, KV_HEADS, BLOCK, DIM, dtype=dtype)
    q = torch.zeros(2, 4, DIM, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16)
    scale = torch.ones(KV_HEADS) if scales else None
    ints = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="flash-attn takes"):
        flash.paged_attention(
            q, cache, cache, q, cu_seqlens_q=ints, seq_lens=ints, block_tables=ints[:, None], num_seqs=1,
            max_query_len=2, max_seq_len=2, scale=1.0, k_scale=scale, v_scale=scale,
        )  # fmt: skip
