"""What bench/gpu.py measures beside ours: cuBLAS and SDPA through torch, flash-attn, vLLM's Marlin.

A peer that is not here is named with the reason (`reasons`), never passed over in silence. Called by _gpu_phases.py.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import _gpu
import torch
import torch.nn.functional as F

Run = Callable[[], Any]


@functools.cache
def reasons() -> dict[str, str]:
    """By peer: why it cannot be measured here, or ""."""
    from headrace.kernels.paged_attention import flash

    ours = "; ".join(flash.is_available())
    return {
        "cublas": "" if torch.cuda.is_available() else "no CUDA device",
        "sdpa": "" if torch.cuda.is_available() else "no CUDA device",
        "flash-attn": _why_not("flash_attn", "flash_attn_func"),
        "flash-attn-4": _why_not("flash_attn.cute", "flash_attn_func"),
        # Its arguments were held against the libraries' signatures; no GPU has run it.
        "headrace over flash-attn (flash.py)": ours,
        "vllm-marlin": _why_not(
            "vllm.model_executor.layers.quantization.utils.marlin_utils", "apply_gptq_marlin_linear"
        ),
    }


def _why_not(module: str, name: str) -> str:
    try:
        getattr(importlib.import_module(module), name)
    except Exception as error:  # an extension for another torch raises what it likes
        return f"{type(error).__name__}: {error}"[:200]
    return ""


def attention(case: _gpu.AttentionCase) -> Iterator[tuple[str, Run]]:
    """SDPA and flash-attn on keys and values that lie in one piece: what they are best at."""
    if case.kv != "bf16":
        return
    model, device = case.model, _gpu.scale.device
    shape = (case.num_seqs, case.context, model.kv_heads, model.head_dim)
    q = torch.randn(case.num_seqs, case.query_len, model.heads, model.head_dim, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "kv")
    is_whole = case.query_len == case.context
    if is_whole or case.query_len == 1:
        heads_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
        yield "sdpa", lambda: F.scaled_dot_product_attention(*heads_first, is_causal=is_whole, enable_gqa=True)
    for peer, module in (("flash-attn", "flash_attn"), ("flash-attn-4", "flash_attn.cute")):
        if not reasons()[peer]:
            attend = importlib.import_module(module).flash_attn_func
            yield peer, lambda attend=attend: attend(q, k, v, causal=True)  # aligned to the last key


def flash(case: _gpu.AttentionCase) -> dict[str, Any]:
    """Our flash.py on the paged cache: its time, and how far it is from our kernel (relative, of the norms)."""
    from headrace.kernels.paged_attention import flash as library

    block_size = 256  # what both libraries take
    why = reasons()["headrace over flash-attn (flash.py)"]
    if why or case.kv != "bf16":
        return {}
    operands = _gpu.attention_operands(case, block_size)
    refused = library.unsupported(head_dims=(case.model.head_dim,), block_size=block_size, arch=_gpu.arch())
    if refused:
        return {"flash_py_refuses": refused}
    config = _gpu.attention_config(case)
    _gpu.attention_runs(operands)(config)[0]()
    ours = operands.out.float().clone()
    runs = _gpu.attention_runs(operands, attend=library.paged_attention)(config)
    runs[0]()
    error = (operands.out.float() - ours).norm() / ours.norm()
    return {"flash_py_us": round(_gpu.microseconds(runs, 16), 1), "flash_py_error": round(float(error), 5)}


def marlin(n: int, k: int, m: int) -> dict[str, Any]:
    """vLLM's Marlin on a weight of the same shape (symmetric, groups of 128)."""
    if reasons()["vllm-marlin"]:
        return {}
    from vllm.model_executor.layers.quantization.utils.marlin_utils import (
        apply_gptq_marlin_linear,
        marlin_make_empty_g_idx,
        marlin_make_workspace_new,
    )
    from vllm.scalar_type import scalar_types

    device = torch.device("cuda")
    weight = torch.randint(-(1 << 31), (1 << 31) - 1, (k // 16, n * 2), dtype=torch.int32, device=device)
    scales = torch.rand(k // 128, n, dtype=torch.bfloat16, device=device)
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    empty, workspace = marlin_make_empty_g_idx(device), marlin_make_workspace_new(device)

    def run() -> None:
        apply_gptq_marlin_linear(
            x, weight, scales, empty, empty, empty, workspace, scalar_types.uint4b8, n, k, is_k_full=True
        )

    return {"vllm_marlin_us": round(_gpu.microseconds([run]), 1)}


def cublas(n: int, k: int, m: int) -> list[Run]:
    """The same product in bf16 by cuBLAS, through torch."""
    device = _gpu.scale.device
    weights = [torch.randn(n, k, device=device, dtype=torch.bfloat16) for _ in range(_gpu.copies_of(2 * n * k))]
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    out = torch.empty(m, n, device=device, dtype=torch.bfloat16)

    def run(weight: torch.Tensor) -> Run:
        return lambda: torch.mm(x, weight.t(), out=out)

    return [run(weight) for weight in weights]
