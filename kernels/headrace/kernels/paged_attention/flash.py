"""Paged attention by flash-attn: the contract of triton.py over a library, chosen at start where it is installed.

Called by `headrace.kernels.gpu.attention`. NOT RUN YET: no machine that built this had a GPU. What is tested is that
the arguments fit the signatures of the versions named below (tests/kernels/test_flash_attention.py).

Two libraries: flash-attn 4 ("flash_attn.cute", sm_90 to sm_11x, any block size) and flash-attn 2 ("flash_attn" with its
compiled extension, sm_80 and newer), whose blocks must be multiples of 256 (2.8.3: "Paged KV cache block size must be
divisible by 256"). Both read [num_blocks, block_size, num_kv_heads, head_dim] by strides, so that our
[num_blocks, num_kv_heads, block_size, head_dim] is a transposed view and nothing is copied. Both choose splits by the
batch: a row's last bits may depend on its neighbours, which those of triton.py never do. Both allocate their output.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from headrace.kernels.paged_attention.config import AttentionConfig

CUTE, CLASSIC = "flash_attn.cute", "flash_attn"  # flash-attn 4 and 2
CLASSIC_BLOCK = 256  # slots


@dataclass(frozen=True)
class _Library:
    """name: CUTE or CLASSIC. varlen: its flash_attn_varlen_func."""

    name: str
    varlen: Callable[..., Any]


def is_available() -> list[str]:
    """Why neither library can be used here, one reason each; nothing where one can. Imports them."""
    try:
        _find()
    except ImportError as error:
        return str(error).split("; ")
    return []


def unsupported(*, head_dims: tuple[int, ...], block_size: int, arch: str) -> list[str]:
    """Why the library that is here cannot serve such a model. arch: "sm_90", or "" where it is not known."""
    name = _find().name
    number = int(arch[3:]) if arch.startswith("sm_") else 0
    widest = 256 if name == CLASSIC or number == 90 else 128
    reasons = [
        f"head_dim {head_dim}: {name} takes multiples of 8 up to {widest}"
        for head_dim in head_dims
        if head_dim % 8 or head_dim > widest
    ]
    if name == CLASSIC and block_size % CLASSIC_BLOCK:
        reasons.append(f"block size {block_size}: {name} takes multiples of {CLASSIC_BLOCK}")
    if number and (number < 80 or (name == CUTE and not 90 <= number < 120)):
        reasons.append(f"{arch}: {name} needs {'sm_80' if name == CLASSIC else 'sm_90 to sm_11x for blocks'}")
    return reasons


def workspace_bytes(**_: object) -> int:
    """As triton.workspace_bytes: the library allocates its own."""
    return 0


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    num_seqs: int,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    workspace: torch.Tensor | None = None,
    config: AttentionConfig | None = None,
) -> None:
    """The contract of `triton.paged_attention`, for 16-bit caches. Raises ValueError on others, ImportError without a
    library; workspace and config are not used.
    """
    if k_cache.dtype != q.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash-attn takes 16-bit keys and values of the queries' type, not {k_cache.dtype}, {q.dtype}"
        )
    if k_scale is not None or v_scale is not None:
        raise ValueError("flash-attn takes no scales of keys and values")
    if num_seqs == 0 or q.shape[0] == 0:
        return
    library = _find()
    arguments = varlen_arguments(
        library.name,
        q,
        k_cache,
        v_cache,
        cu_seqlens_q=cu_seqlens_q[: num_seqs + 1],
        seq_lens=seq_lens[:num_seqs],
        block_tables=block_tables[:num_seqs],
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
    )
    result = library.varlen(**arguments)
    out.copy_(result[0] if isinstance(result, tuple) else result)


def varlen_arguments(
    library: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    block_tables: torch.Tensor,
    max_query_len: int,
    max_seq_len: int,
    scale: float,
    window: int,
    soft_cap: float,
) -> Mapping[str, object]:
    """Keyword arguments of the library's flash_attn_varlen_func.

    Its causal mask is aligned to the last key, as ours; its window counts positions to the left of the query, ours the
    query as well.
    """
    shared: dict[str, object] = {
        "q": q,
        "k": k_cache.transpose(1, 2),
        "v": v_cache.transpose(1, 2),
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_query_len,
        "max_seqlen_k": max_seq_len,
        "softmax_scale": scale,
        "causal": True,
        "softcap": soft_cap,
    }
    if library == CUTE:
        left = window - 1 if window else None
        own = {"seqused_k": seq_lens, "page_table": block_tables, "window_size": (left, 0 if window else None)}
        # 0 splits: as many as it thinks fit.
        return shared | own | {"num_splits": 0}
    ends = torch.nn.functional.pad(torch.cumsum(seq_lens, 0, dtype=torch.int32), (1, 0))
    left = window - 1 if window else -1
    return shared | {"cu_seqlens_k": ends, "block_table": block_tables, "window_size": (left, 0 if window else -1)}


def _find() -> _Library:
    """The first library that can be imported. Raises ImportError with each one's reason, joined by "; "."""
    cute, classic = _import(CUTE), _import(CLASSIC)
    for found in (cute, classic):
        if isinstance(found, _Library):
            return found
    raise ImportError(f"{cute}; {classic}")


def _import(name: str) -> _Library | str:
    """The library, or why it cannot be imported."""
    try:
        return _Library(name, importlib.import_module(name).flash_attn_varlen_func)
    except (ImportError, AttributeError, OSError) as error:
        return f"{name}: {error}"
