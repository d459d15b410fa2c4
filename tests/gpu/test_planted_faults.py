"""Faults planted in correct kernels: the machine that judges our kernels must find each, and pass the originals.

Runs in the interpreter and under ttsem. A GPU would forgive most of these, or corrupt its memory, so it is spared.
"""

from __future__ import annotations

import sys

import pytest
import torch

from tests.gpu.machine import IS_INTERPRETED, IS_TTSEM
from tests.gpu.planted import copy, gather_kernel, last_arrives_kernel, racy_kernel

if IS_INTERPRETED:
    from tests.gpu.interpreter.sanitizer import MemoryFault as Fault
elif IS_TTSEM:
    Fault = sys.modules["__main__"].KernelFault  # `python -m ttsem.sanitize` runs that module as __main__
else:
    # They read and write where they must not: on a GPU that is undefined, and nothing would report it.
    pytest.skip("planted faults are for the checkers: this is a GPU", allow_module_level=True)


def last_arrives(device: str, *, relaxed: bool) -> None:
    parts, counter, out = (torch.zeros(5, 4), torch.zeros(1, dtype=torch.int32), torch.zeros(4))
    parts, counter, out = parts.to(device), counter.to(device), out.to(device)
    last_arrives_kernel[(5,)](parts, counter, out, RELAXED=relaxed, BARRIER=True)
    assert out.tolist() == [15.0] * 4


def test_correct_kernels_pass(device: str) -> None:
    copy(20, device)
    copy(32, device, mask_load=False, mask_store=False)
    racy_kernel[(4,)](torch.empty(32, device=device), STRIDE=8, BLOCK=8)
    last_arrives(device, relaxed=False)


def test_a_missing_mask_on_a_load(device: str) -> None:
    with pytest.raises(Fault, match="src"):
        copy(20, device, mask_load=False)


def test_a_missing_mask_on_a_store(device: str) -> None:
    with pytest.raises(Fault, match="dst"):
        copy(20, device, mask_store=False)


@pytest.mark.parametrize("index", [-1, 8])
def test_an_index_from_memory_that_is_out_of_its_table(device: str, index: int) -> None:
    table, at = torch.ones(8, device=device), torch.tensor([index], dtype=torch.int32, device=device)
    with pytest.raises(Fault, match="table"):
        gather_kernel[(1,)](table, at, torch.empty(1, device=device))


def test_programs_that_store_to_one_element(device: str) -> None:
    with pytest.raises(Fault, match="out"):
        racy_kernel[(4,)](torch.empty(32, device=device), STRIDE=7, BLOCK=8)


def test_a_counter_that_orders_nothing(device: str) -> None:
    with pytest.raises(Fault, match="parts"):
        last_arrives(device, relaxed=True)
