"""The engine on the GPU back end, one step in flight: company, chunks, hits and preemption change no token.

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

from pathlib import Path

from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest
from headrace.kernels.batch import Executor
from headrace.kernels.gpu.executor import GpuExecutor, GpuOptions
from headrace.kernels.gpu.shape import StepLimits
from headrace.models.load import LoadedModel, load_model

from tests.engine.test_with_model import check_company_changes_nothing
from tests.gpu.e2e.support import BLOCK


def make(device: str, model: LoadedModel, num_blocks: int, block_size: int) -> GpuExecutor:
    limits = StepLimits(max_tokens=512, max_seqs=64, max_logit_rows=256, max_model_len=64, block_size=block_size)
    executor = GpuExecutor(model.program, model.weights, limits, GpuOptions("fp32", "fp32", device, has_graphs=False))
    executor.allocate_kv(num_blocks)
    return executor


def test_tokens_and_log_probabilities_are_those_of_a_solo_run(tiny_llama_dir: Path, device: str) -> None:
    def make_executor(model: LoadedModel, num_blocks: int, block_size: int) -> Executor:
        return make(device, model, num_blocks, block_size)

    check_company_changes_nothing(make_executor, tiny_llama_dir, 5, BLOCK, count=4)


def test_a_cancelled_sequence_leaves_its_blocks_and_its_neighbour_alone(tiny_llama_dir: Path, device: str) -> None:
    model = load_model(tiny_llama_dir)

    def tokens_beside(cancelled: bool) -> list[int]:
        config = EngineConfig(num_blocks=5, block_size=BLOCK, max_model_len=48, enable_prefix_cache=False)
        engine = Engine(make(device, model, 5, BLOCK), config)
        engine.add(SequenceRequest(1, [5, 6, 7], SamplingParams(max_tokens=8, temperature=0.0)))
        tokens: list[int] = []
        for step in range(14):
            if cancelled and step == 0:
                engine.add(SequenceRequest(2, [9] * 20, SamplingParams(max_tokens=20, temperature=0.9)))
            if cancelled and step == 4:
                engine.cancel(2)
                engine.add(SequenceRequest(3, [8] * 20, SamplingParams(max_tokens=3)))  # takes its blocks
            for output in engine.step():
                tokens += [token.token_id for token in output.tokens if output.id == 1]
            engine.check_integrity()
        assert not engine.has_work()
        stats = engine.stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        return tokens

    alone = tokens_beside(cancelled=False)
    assert len(alone) == 8
    assert tokens_beside(cancelled=True) == alone
