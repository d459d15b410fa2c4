"""Kernels with a fault to switch on: what every checker must find (test_planted_faults.py, interpreter/)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def copy_kernel(src, dst, count, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASK_LOAD:
        value = tl.load(src + at, mask=at < count, other=0.0)
    else:
        value = tl.load(src + at)
    if MASK_STORE:
        tl.store(dst + at, value, mask=at < count)
    else:
        tl.store(dst + at, value)


@triton.jit
def gather_kernel(table, index, out):
    tl.store(out, tl.load(table + tl.load(index)))


@triton.jit
def racy_kernel(out, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * STRIDE + tl.arange(0, BLOCK)
    tl.store(out + at, tl.program_id(0).to(tl.float32) + tl.zeros([BLOCK], tl.float32))


@triton.jit
def last_arrives_kernel(parts, counter, out, RELAXED: tl.constexpr, BARRIER: tl.constexpr):
    """Every program leaves a part; the last to arrive adds them in order and resets the counter."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, 4)
    tl.store(parts + program * 4 + at, tl.zeros([4], tl.float32) + program + 1)
    if BARRIER:
        tl.debug_barrier()
    if RELAXED:
        arrived = tl.atomic_add(counter, 1, sem="relaxed")
    else:
        arrived = tl.atomic_add(counter, 1)
    if arrived == programs - 1:
        total = tl.zeros([4], tl.float32)
        for index in range(programs):
            total += tl.load(parts + index * 4 + at)
        tl.store(out + at, total)
        tl.store(counter, 0)


def copy(count: int, device: str, *, mask_load: bool = True, mask_store: bool = True) -> None:
    """Copy `count` floats in blocks of 16, with or without the masks."""
    src, dst = torch.ones(count, device=device), torch.full((count,), float("nan"), device=device)
    copy_kernel[(triton.cdiv(count, 16),)](src, dst, count, BLOCK=16, MASK_LOAD=mask_load, MASK_STORE=mask_store)
    assert torch.equal(src, dst)
