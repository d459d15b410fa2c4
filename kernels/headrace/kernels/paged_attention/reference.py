"""Op: causal attention over KV blocks, for any mix of prefill chunks and decode rows; and the write that precedes it.

Called by the torch executor for `program.KvWrite` and `program.PagedAttention`; defines their meaning. What depends on
the batch only is planned once per step and window (`plan_attention`) and shared by the layers.

A key that a query must not see gets the score -inf, and slots that pad a group read a block that is zero and never
written: whatever a freed block still holds, NaN included, cannot reach another sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from headrace.kernels.batch import StepBatch

I64 = npt.NDArray[np.int64]

# Scores of one group, in floats (16 MiB): bounds the memory of a long prefill chunk, whose queries are then tiled.
MAX_GROUP_SCORES = 1 << 22


@dataclass(frozen=True, eq=False)
class AttentionGroup:
    """n sequences with r query rows each, attending to L slots each.

    rows: int64 [n * r], rows of the batch. index: int64 [n * num_kv_heads * L], slot * num_kv_heads + head of each
    key: with it each head's keys are gathered contiguous.
    bias: float32 [n, 1, 1, r, L] of 0 (seen) and -inf (not), or None where every query sees every slot.
    """

    rows: torch.Tensor
    index: torch.Tensor
    bias: torch.Tensor | None
    num_sequences: int


def kv_write(kv: torch.Tensor, values: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """kv[slot_mapping[t]] = values[t].

    kv: float32 [num_blocks + 1, block_size, num_kv_heads, head_dim], changed in place; the last block is the zero
    block. values: float32 [T, num_kv_heads * head_dim]. slot_mapping: int64 [T], all different.
    """
    kv.view(-1, values.shape[1]).index_copy_(0, slot_mapping, values)


def paged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: list[AttentionGroup], scale: float, soft_cap: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v per sequence and head, causal, over the slots of `groups`.

    q: float32 [T, num_heads * head_dim], head h reads KV head h // (num_heads / num_kv_heads).
    k, v: float32 [num_blocks + 1, block_size, num_kv_heads, head_dim]. With soft_cap > 0 a scaled score s becomes
    soft_cap * tanh(s / soft_cap). Returns float32 [T, num_heads * head_dim].
    """
    if len(groups) == 1 and groups[0].rows.shape[0] == q.shape[0]:
        return _attend(q, k, v, groups[0], scale, soft_cap)
    out = torch.empty_like(q)
    for group in groups:
        out.index_copy_(0, group.rows, _attend(q.index_select(0, group.rows), k, v, group, scale, soft_cap))
    return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: AttentionGroup, scale: float, soft_cap: float
) -> torch.Tensor:
    """One group: q is [n * r, num_heads * head_dim], its rows in the group's order."""
    _, _, num_kv_heads, head_dim = k.shape
    n = group.num_sequences
    r = q.shape[0] // n
    keys = k.view(-1, head_dim).index_select(0, group.index).view(n * num_kv_heads, -1, head_dim)
    values = v.view(-1, head_dim).index_select(0, group.index).view(keys.shape)
    # The query heads of a KV head and their r rows are all rows of one product: [n * num_kv_heads, g * r, head_dim].
    queries = q.view(n, r, num_kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4) * scale
    num_grouped = queries.shape[2]
    scores = torch.bmm(queries.reshape(n * num_kv_heads, num_grouped * r, head_dim), keys.transpose(1, 2))
    if soft_cap > 0.0:
        scores.div_(soft_cap).tanh_().mul_(soft_cap)
    if group.bias is not None:
        scores.view(n, num_kv_heads, num_grouped, r, -1).add_(group.bias)
    out = torch.bmm(torch.softmax(scores, dim=-1), values)
    return out.view(n, num_kv_heads, num_grouped, r, head_dim).permute(0, 3, 1, 2, 4).reshape(q.shape)


@dataclass(frozen=True)
class AttentionShape:
    """What the plan of a step depends on besides the batch. zero_slot is a slot of the zero block, for padding."""

    num_heads: int
    num_kv_heads: int
    window: int
    block_size: int
    zero_slot: int


def plan_attention(batch: StepBatch, shape: AttentionShape, device: torch.device) -> list[AttentionGroup]:
    """Group the batch's sequences for `paged_attention`.

    Decode rows (sequences with one row) go together where their lengths are within a factor of two; a prefill chunk is
    a group by itself, or several tiles of rows.
    """
    groups = [*_decode_groups(batch, shape), *_prefill_groups(batch, shape)]
    return [group.to(shape.num_kv_heads, device) for group in groups]


@dataclass(frozen=True, eq=False)
class _NumpyGroup:
    rows: I64  # [n * r]
    slots: I64  # [n, L]
    is_seen: npt.NDArray[np.bool_]  # [n, r, L]

    def to(self, num_kv_heads: int, device: torch.device) -> AttentionGroup:
        index = self.slots[:, None, :] * num_kv_heads + np.arange(num_kv_heads)[:, None]
        bias = None
        if not self.is_seen.all():
            mask = np.where(self.is_seen, np.float32(0.0), np.float32(-np.inf))
            bias = torch.from_numpy(mask).to(device)[:, None, None]
        return AttentionGroup(
            torch.from_numpy(self.rows).to(device),
            torch.from_numpy(index.reshape(-1)).to(device),
            bias,
            len(self.slots),
        )


def _decode_groups(batch: StepBatch, shape: AttentionShape) -> Iterator[_NumpyGroup]:
    sequences = np.flatnonzero(np.diff(batch.cu_seqlens_q) == 1)
    seq_lens = batch.seq_lens[sequences].astype(np.int64)
    first = np.maximum(seq_lens - shape.window, 0) if shape.window else np.zeros_like(seq_lens)
    lengths = seq_lens - first
    # Up to 64, 128, 256 ...: the exponent of the next power of two.
    buckets = np.maximum(np.ceil(np.log2(lengths)).astype(np.int64), 6)
    for bucket in np.unique(buckets):
        members = np.flatnonzero(buckets == bucket)
        offsets = np.arange(lengths[members].max())
        is_key = offsets < lengths[members, None]
        positions = np.minimum(first[members, None] + offsets, seq_lens[members, None] - 1)
        slots = np.where(is_key, _slots(batch, sequences[members, None], positions, shape.block_size), shape.zero_slot)
        yield _NumpyGroup(batch.cu_seqlens_q[sequences[members]].astype(np.int64), slots, is_key[:, None, :])


def _prefill_groups(batch: StepBatch, shape: AttentionShape) -> Iterator[_NumpyGroup]:
    query_lens = np.diff(batch.cu_seqlens_q)
    for sequence in np.flatnonzero(query_lens > 1):
        seq_len, num_rows, row = (int(a[sequence]) for a in (batch.seq_lens, query_lens, batch.cu_seqlens_q))
        tile = max(MAX_GROUP_SCORES // (shape.num_heads * seq_len), 1)
        for begin in range(0, num_rows, tile):
            end = min(begin + tile, num_rows)
            queries = np.arange(begin, end)[:, None] + (seq_len - num_rows)
            keys = np.arange(
                max(int(queries[0, 0]) - shape.window + 1, 0) if shape.window else 0, int(queries[-1, 0]) + 1
            )
            is_seen = keys <= queries
            if shape.window:
                is_seen &= keys > queries - shape.window
            slots = _slots(batch, np.array([[sequence]]), keys[None, :], shape.block_size)
            yield _NumpyGroup(np.arange(row + begin, row + end), slots, is_seen[None])


def _slots(batch: StepBatch, sequences: I64, positions: I64, block_size: int) -> I64:
    blocks = batch.block_tables[sequences, positions // block_size].astype(np.int64)
    slots: I64 = blocks * block_size + positions % block_size
    return slots
