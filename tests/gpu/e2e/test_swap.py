"""Preempted sequences whose KV goes to the host and back: bit-equal to a run in which nobody is ever preempted.

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest, TokenOutput
from headrace.kernels.batch import SwappingExecutor
from headrace.kernels.gpu.executor import GpuExecutor
from headrace.kernels.gpu.swap import NEVER, Costs, min_swap_tokens, num_host_blocks
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.gpu.e2e.support import BLOCK, gpu_executor
from tests.support.stepping import step_batch

REQUESTS = [
    SequenceRequest(
        number,
        [number * 7 + i for i in range(14)],
        SamplingParams(max_tokens=20, seed=number, temperature=0.8, num_logprobs=0),
    )
    for number in (1, 2)
]


@pytest.fixture(scope="module")
def smallest(tiny_llama_dir: Path) -> LoadedModel:
    return load_model(tiny_llama_dir)


def with_host(model: LoadedModel, device: str, num_blocks: int, num_host: int, **options: str) -> GpuExecutor:
    executor = gpu_executor(model, device, num_blocks, has_graphs=False, **options)
    assert executor.allocate_host(num_host * executor.kv_block_bytes) == num_host
    return executor


def run(executor: GpuExecutor, num_blocks: int, num_host: int) -> tuple[Engine, dict[int, list[TokenOutput]]]:
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_model_len=48,
        max_num_batched_tokens=32,
        max_num_seqs=4,
        max_logit_rows=8,
        enable_prefix_cache=False,
        num_host_blocks=num_host,
        min_swap_tokens=executor.min_swap_tokens,
    )
    engine = Engine(executor, config)
    tokens: dict[int, list[TokenOutput]] = {request.id: [] for request in REQUESTS}
    for request in REQUESTS:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            tokens[output.id] += output.tokens
        engine.check_integrity()
        free = engine._scheduler.blocks.free
        for block in free:  # what the engine has let go of belongs to nobody
            executor.poison(block)
    return engine, tokens


def test_a_preempted_run_is_bit_equal_to_one_with_room_for_all(smallest: LoadedModel, device: str) -> None:
    """Log-probabilities too, in float32: the very KV that left comes back."""
    roomy, want = run(with_host(smallest, device, 9, 0), 9, 0)
    tight, got = run(with_host(smallest, device, 5, 4), 5, 4)
    assert roomy.stats().num_preemptions == 0
    stats = tight.stats()
    assert stats.num_swapped_out == stats.num_preemptions > 0
    assert stats.num_free_host_blocks == 4
    assert got == want


@pytest.mark.parametrize("kv", ["fp32", "int8", "fp8"])
def test_blocks_come_back_elsewhere_bit_for_bit(smallest: LoadedModel, device: str, kv: str) -> None:
    executor = with_host(smallest, device, 8, 5, kv_dtype=kv)
    assert isinstance(executor, SwappingExecutor)
    prompt = list(range(3, 23))
    executor.forward(step_batch([(prompt, 0, [2, 6])], BLOCK, last_only=True))
    want = executor.forward(step_batch([([9], 20, [2, 6])], BLOCK))
    executor.swap_out((2, 6), (4, 1))
    for block in (2, 6):
        executor.poison(block)
    executor.swap_out((7,), (0,))
    executor.swap_in((5, 3), (4, 1))
    np.testing.assert_array_equal(executor.forward(step_batch([([9], 20, [5, 3])], BLOCK)), want)


def test_no_memory_for_it_is_no_swap_space(tiny_models: TinyModels, smallest: LoadedModel, device: str) -> None:
    executor = gpu_executor(smallest, device)
    assert executor.allocate_host(executor.kv_block_bytes - 1) == 0
    assert "swap space" not in executor.summary()
    assert executor.allocate_host(executor.kv_block_bytes) == 1
    assert "swap space" in executor.summary()


def test_when_swapping_is_worth_it() -> None:
    """By data sheets, of an H100 on PCIe 5: docs/decisions/0008."""
    assert min_swap_tokens(Costs(prefill=40e-6, decode=5e-3, swap=64 * 5e-6, swap_start=50e-6), 64) == 145
    assert min_swap_tokens(Costs(prefill=0.7e-6, decode=100e-6, swap=64 * 0.9e-6, swap_start=50e-6), 64) == NEVER
    assert num_host_blocks(1 << 30, 1 << 20) == 1024
    assert num_host_blocks(1 << 60, 1 << 20) < 1 << 39
