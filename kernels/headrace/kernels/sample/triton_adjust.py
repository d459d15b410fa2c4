# mypy: ignore-errors
"""Kernels that touch single tokens: biases, penalties and bans put on logits and taken off again, and the sampled ids
handed to the next step.

Few logits of a row change, so the row is changed in place and the old logits are kept in the workspace. A row's newest
token may still be on the device only ("pending"): it counts as one more occurrence, without an entry or beside its own.
"""

import triton
import triton.language as tl
from headrace.kernels.sample.triton_fields import (
    BANNED_FLAG,
    FIRST_ENTRY,
    FREQUENCY,
    LAST_ENTRY,
    MAX_FLOAT,
    PENDING,
    PRESENCE,
    REPETITION,
    SEEN_FLAG,
    float_field,
    int_field,
)


@triton.jit
def adjust_kernel(logits, rows, entries, previous, saved, stride, vocab_size, num_entries, BLOCK: tl.constexpr):
    """Program (row): save the logits of the row's entries, then change them. saved: float32 [E + S]."""
    row = tl.program_id(0)
    first, last = int_field(rows, row, FIRST_ENTRY), int_field(rows, row, LAST_ENTRY)
    line = logits + row.to(tl.int64) * stride
    pending_id = -1
    if previous is not None:
        pending = int_field(rows, row, PENDING)
        if pending >= 0:
            pending_id = tl.load(previous + pending)
    is_listed = 0
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < last
        token_id = tl.load(entries + 4 * entry, mask=mask, other=-2)
        mask = mask & (token_id >= 0) & (token_id < vocab_size)  # an id of nothing must not write to a neighbour
        count = tl.load(entries + 4 * entry + 1, mask=mask, other=0)
        flags = tl.load(entries + 4 * entry + 2, mask=mask, other=0)
        bias = tl.load(entries + 4 * entry + 3, mask=mask, other=0).to(tl.float32, bitcast=True)
        is_pending = token_id == pending_id
        is_listed = tl.maximum(is_listed, tl.max(is_pending.to(tl.int32), axis=0))
        count += is_pending.to(tl.int32)
        flags = tl.where(is_pending, flags | SEEN_FLAG, flags)
        old = tl.load(line + token_id, mask=mask, other=0.0)
        tl.store(saved + entry, old, mask=mask)
        tl.store(line + token_id, adjusted(old, bias, count, flags, rows, row), mask=mask)
    if (pending_id >= 0) & (is_listed == 0):
        old = tl.load(line + pending_id)
        tl.store(saved + num_entries + row, old)
        once = (pending_id >= 0).to(tl.int32)
        tl.store(line + pending_id, adjusted(old, 0.0, once, once * SEEN_FLAG, rows, row))


@triton.jit
def restore_kernel(logits, rows, entries, previous, saved, stride, vocab_size, num_entries, BLOCK: tl.constexpr):
    """Program (row): put the logits back that `adjust_kernel` saved."""
    row = tl.program_id(0)
    first, last = int_field(rows, row, FIRST_ENTRY), int_field(rows, row, LAST_ENTRY)
    line = logits + row.to(tl.int64) * stride
    pending_id = -1
    if previous is not None:
        pending = int_field(rows, row, PENDING)
        if pending >= 0:
            pending_id = tl.load(previous + pending)
    is_listed = 0
    for start in range(first, last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        mask = entry < last
        token_id = tl.load(entries + 4 * entry, mask=mask, other=-2)
        mask = mask & (token_id >= 0) & (token_id < vocab_size)  # an id of nothing must not write to a neighbour
        is_listed = tl.maximum(is_listed, tl.max((token_id == pending_id).to(tl.int32), axis=0))
        tl.store(line + token_id, tl.load(saved + entry, mask=mask, other=0.0), mask=mask)
    if (pending_id >= 0) & (is_listed == 0):
        tl.store(line + pending_id, tl.load(saved + num_entries + row))


@triton.jit
def adjusted(x, bias, count, flags, rows, row):
    """As `reference._adjust`, in its order. Compiled without fused multiply-add, so that it rounds as numpy does."""
    repetition = float_field(rows, row, REPETITION)
    frequency, presence = float_field(rows, row, FREQUENCY), float_field(rows, row, PRESENCE)
    x = x + bias
    is_seen = (flags & SEEN_FLAG) != 0
    divided = tl.div_rn(x, tl.zeros_like(x) + repetition)
    x = tl.where(is_seen, tl.where(x > 0.0, divided, x * repetition), x)
    x = tl.where(count > 0, x - frequency * count.to(tl.float32) - presence, x)
    x = tl.minimum(tl.maximum(x, -MAX_FLOAT), MAX_FLOAT)
    return tl.where((flags & BANNED_FLAG) != 0, float("-inf"), x)


@triton.jit
def feed_kernel(sampled, source, token_ids, num_tokens, BLOCK: tl.constexpr):
    """token_ids[t] = sampled[source[t]] where source[t] >= 0."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(source + t, mask=t < num_tokens, other=-1)
    tl.store(token_ids + t, tl.load(sampled + row, mask=row >= 0, other=0), mask=row >= 0)
