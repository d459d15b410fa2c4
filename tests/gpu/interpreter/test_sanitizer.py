"""Planted faults: what the sanitizer must find, and what it must let pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tests.gpu.interpreter import sanitizer
from tests.gpu.interpreter.launch import program_order
from tests.gpu.interpreter.sanitizer import MemoryFault
from tests.gpu.planted import copy, copy_kernel, gather_kernel, last_arrives_kernel, racy_kernel


@triton.jit
def no_other_kernel(src, dst, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(dst, tl.sum(tl.load(src + at, mask=at < count), 0))


@triton.jit
def neighbour_kernel(data, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    value = tl.load(data + (program + 1) * BLOCK + at)
    tl.store(data + program * BLOCK + at, value)


@triton.jit
def disagree_kernel(out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at // 2, at)


@triton.jit
def pointers_kernel(table, out):
    tl.store(out, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


@triton.jit
def twice_kernel(x, out, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    for row in range(ROWS):
        tl.store(out + tl.program_id(0) * ROWS * BLOCK + row * BLOCK + at, tl.load(x + at))


def test_an_unmasked_load_is_named_with_kernel_line_and_argument() -> None:
    with pytest.raises(MemoryFault, match=r"copy_kernel, program \(1, 0, 0\): load at planted.py:\d+ .* `src`"):
        copy(20, "cpu", mask_load=False)


def test_an_unmasked_store_is_found() -> None:
    with pytest.raises(MemoryFault, match=r"store at .* in 12 of 16 lanes: up to 48 bytes past the end of `dst`"):
        copy(20, "cpu", mask_store=False)


def test_bounds_are_the_views_own_even_inside_one_storage() -> None:
    buffer = torch.ones(64)
    with pytest.raises(MemoryFault, match="`src`"):
        copy_kernel[(1,)](buffer[:20], buffer[32:], 20, BLOCK=32, MASK_LOAD=False, MASK_STORE=True)


@pytest.mark.parametrize("index", [-1, 8, 2**31 - 1])
def test_an_index_out_of_a_table_is_found_wherever_it_lands(index: int) -> None:
    with pytest.raises(MemoryFault, match="`table`"):
        gather_kernel[(1,)](torch.ones(8), torch.tensor([index], dtype=torch.int32), torch.empty(1))


def test_masked_lanes_without_other_are_undefined() -> None:
    out = torch.zeros(1)
    no_other_kernel[(1,)](torch.ones(3), out, 3, BLOCK=4)
    assert out.isnan()


def test_two_programs_storing_one_element_race() -> None:
    racy_kernel[(4,)](torch.empty(32), STRIDE=8, BLOCK=8)
    with pytest.raises(MemoryFault, match=r"race on `out`: store .*\(0, 0, 0\) and store .*\(1, 0, 0\)"):
        racy_kernel[(4,)](torch.empty(32), STRIDE=7, BLOCK=8)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_reading_what_a_neighbour_writes_races_in_either_order(order: str) -> None:
    with program_order(order), pytest.raises(MemoryFault, match="race on `data`"):
        neighbour_kernel[(2,)](torch.zeros(12), BLOCK=4)


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_the_last_arriving_program_may_read_the_others_parts(order: str) -> None:
    parts, counter, out = torch.empty(5, 4), torch.zeros(1, dtype=torch.int32), torch.empty(4)
    with program_order(order):
        last_arrives_kernel[(5,)](parts, counter, out, RELAXED=False, BARRIER=True)
    assert out.tolist() == [15.0] * 4
    assert counter.item() == 0


@pytest.mark.parametrize(("relaxed", "barrier"), [(True, True), (False, False)])
def test_a_relaxed_counter_orders_nothing_nor_does_one_without_a_barrier(relaxed: bool, barrier: bool) -> None:
    """One thread does a scalar atomic, and Triton puts no bar.sync before it (seen in its PTX, 3.6.0)."""
    parts, counter, out = torch.empty(5, 4), torch.zeros(1, dtype=torch.int32), torch.empty(4)
    with pytest.raises(MemoryFault, match="race on `parts`"):
        last_arrives_kernel[(5,)](parts, counter, out, RELAXED=relaxed, BARRIER=barrier)


def test_lanes_of_one_store_must_agree() -> None:
    with pytest.raises(MemoryFault, match="different values"):
        disagree_kernel[(1,)](torch.empty(8, dtype=torch.int32), BLOCK=16)


def test_pointers_from_memory_need_their_tensor_named() -> None:
    data, out = torch.full((1,), 3.0), torch.zeros(1)
    table = torch.tensor([data.data_ptr()], dtype=torch.int64)
    with pytest.raises(MemoryFault, match="pointer from memory"):
        pointers_kernel[(1,)](table, out)
    with sanitizer.also([("data", data)]):
        pointers_kernel[(1,)](table, out)
    assert out.item() == 3.0


def test_traffic_counts_repeated_loads() -> None:
    x, out = torch.ones(16), torch.empty(64)
    with sanitizer.traffic() as counts:
        twice_kernel[(2,)](x, out, ROWS=2, BLOCK=16)
    load, store = counts["twice_kernel", "x", "load"], counts["twice_kernel", "out", "store"]
    assert (load.requested, load.unique, load.amplification) == (256, 64, 4.0)
    assert (store.requested, store.unique, store.sectors) == (256, 256, 256)
