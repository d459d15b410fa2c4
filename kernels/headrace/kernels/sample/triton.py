"""Sampling on the GPU: logits to tokens, which stay on the device. Called by the GPU executor at the end of a step.

Two launches for rows that take the best token or draw from all; one or three more where a row wants filters, penalties
or a list of the most likely tokens. The meaning is `reference.py`'s; noise and sums are float32 here, so a token may
differ where two candidates are within a few units of the last place of each other.
"""

from __future__ import annotations

import torch
import triton
from headrace.kernels.sample.device import MAX_TOP, DeviceSampling, DeviceTokens
from headrace.kernels.sample.triton_adjust import adjust_kernel, feed_kernel, restore_kernel
from headrace.kernels.sample.triton_fields import CHUNK, NUM_PLANES
from headrace.kernels.sample.triton_scan import finish_kernel, scan_kernel
from headrace.kernels.sample.triton_select import select_kernel, top_kernel

_NUM_WARPS = 16  # of the kernels that go through a row alone
_ENTRIES = 256  # at a time


def workspace_bytes(num_rows: int, vocab_size: int, num_entries: int) -> int:
    """Bytes of workspace that `sample` needs."""
    num_chunks = -(-vocab_size // CHUNK)
    return 4 * (NUM_PLANES * num_rows * num_chunks + 3 * num_rows + num_entries)


def sample(
    logits: torch.Tensor,
    params: DeviceSampling,
    out: DeviceTokens,
    workspace: torch.Tensor,
    *,
    previous: torch.Tensor | None = None,
) -> None:
    """Sample or score each row of logits, float32 [S, V] with dense rows.

    The logits are as they were when this returns; penalties and bans change them in between. workspace: any dtype, at
    least `workspace_bytes`, aligned to 4. previous: int32 token ids of the step before, where a row's `pending` says
    so. A row with NaN or infinity is marked in out.is_finite and gets token 0 (or its target) and a logprob of NaN.
    """
    num_rows, vocab_size = logits.shape
    _check(logits, params, out, workspace)
    if num_rows == 0:
        return
    if params.has_pending and previous is None:
        raise ValueError("sample: rows count a pending token, so previous is needed")
    floats = workspace.view(torch.float32)
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    shape = (logits.stride(0), vocab_size, num_rows, num_chunks)
    chunks = triton.next_power_of_2(num_chunks)
    scan_kernel[(num_rows, num_chunks)](logits, params.rows, floats, *shape, CHUNK=CHUNK, num_warps=4)
    if params.has_select:
        _select(logits, params, floats, previous, shape)
    finish_kernel[(num_rows,)](
        logits,
        params.rows,
        floats,
        out.token_ids,
        out.logprob,
        out.is_finite,
        *shape,
        CHUNKS=chunks,
        num_warps=1,
    )
    if params.num_top > 0:
        top_kernel[(num_rows,)](
            logits,
            params.rows,
            floats,
            out.top_ids,
            out.top_logprobs,
            *shape,
            MAX_TOP=MAX_TOP,
            SLOTS=triton.next_power_of_2(MAX_TOP),
            CHUNKS=chunks,
            BLOCK=CHUNK,
            num_warps=_NUM_WARPS,
        )


def feed(sampled: torch.Tensor, source: torch.Tensor, token_ids: torch.Tensor) -> None:
    """token_ids[t] = sampled[source[t]] where source[t] >= 0: what a step sampled becomes what the next one reads.

    All int32; token_ids and source [T].
    """
    if source.shape != token_ids.shape or {sampled.dtype, source.dtype, token_ids.dtype} != {torch.int32}:
        raise ValueError(
            f"feed: source {tuple(source.shape)}, token_ids {tuple(token_ids.shape)}: want int32, one each"
        )
    num_tokens = token_ids.shape[0]
    if num_tokens:
        feed_kernel[(triton.cdiv(num_tokens, 256),)](sampled, source, token_ids, num_tokens, BLOCK=256, num_warps=2)


def _select(
    logits: torch.Tensor,
    params: DeviceSampling,
    workspace: torch.Tensor,
    previous: torch.Tensor | None,
    shape: tuple[int, int, int, int],
) -> None:
    """The rows with penalties or filters."""
    stride, vocab_size, num_rows, num_chunks = shape
    num_entries = params.entries.shape[0]
    has_entries = num_entries > 0 or params.has_pending
    saved = workspace[NUM_PLANES * num_rows * num_chunks + 2 * num_rows :]
    touched = (logits, params.rows, params.entries, previous if params.has_pending else None, saved)
    if has_entries:
        # Without fused multiply-add, so that penalties round as in the reference.
        adjust_kernel[(num_rows,)](
            *touched, stride, vocab_size, num_entries, BLOCK=_ENTRIES, num_warps=4, enable_fp_fusion=False
        )
    select_kernel[(num_rows,)](
        logits,
        params.rows,
        workspace,
        *shape,
        CHUNKS=triton.next_power_of_2(num_chunks),
        BLOCK=CHUNK,
        num_warps=_NUM_WARPS,
    )
    if has_entries:
        restore_kernel[(num_rows,)](*touched, stride, vocab_size, num_entries, BLOCK=_ENTRIES, num_warps=4)


def _check(logits: torch.Tensor, params: DeviceSampling, out: DeviceTokens, workspace: torch.Tensor) -> None:
    num_rows, vocab_size = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"sample: logits {logits.dtype}, strides {logits.stride()}: want float32, dense rows")
    if params.rows.shape[0] != num_rows or out.token_ids.shape[0] != num_rows:
        raise ValueError(
            f"sample: {num_rows} rows of logits, parameters of {params.rows.shape[0]}, out for {out.token_ids.shape[0]}"
        )
    needed = workspace_bytes(num_rows, vocab_size, params.entries.shape[0])
    if workspace.numel() * workspace.element_size() < needed:
        raise ValueError(f"sample: workspace of {workspace.numel() * workspace.element_size()} bytes, needs {needed}")
