"""The engine on an executor and a tiny model: company, chunks, hits and preemption change no real token.

Here the executor is the torch reference; tests/gpu/e2e/test_engine.py has the same done by the GPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest, TokenOutput
from headrace.kernels.batch import Executor
from headrace.models.load import LoadedModel, load_model

NUM_BLOCKS, BLOCK_SIZE = 14, 4

MakeExecutor = Callable[[LoadedModel, int, int], Executor]  # (model, num_blocks, block_size)


def torch_executor(model: LoadedModel, num_blocks: int, block_size: int) -> Executor:
    from headrace.kernels.torch_executor import TorchExecutor

    return TorchExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=block_size)


def run(
    make: MakeExecutor,
    directory: Path,
    requests: list[SequenceRequest],
    num_blocks: int,
    block_size: int,
    **limits: int | bool,
) -> tuple[Engine, list[list[TokenOutput]]]:
    model = load_model(directory)
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=64,
        vocab_size=model.info.vocab_size,
        **limits,  # type: ignore[arg-type]
    )
    engine = Engine(make(model, num_blocks, block_size), config)
    for request in requests:
        engine.add(request)
    tokens: dict[int, list[TokenOutput]] = {request.id: [] for request in requests}
    while engine.has_work():
        for output in engine.step():
            tokens[output.id] += output.tokens
    engine.check_integrity()
    return engine, list(tokens.values())


def test_tokens_and_log_probabilities_are_those_of_a_solo_run(tiny_llama_dir: Path) -> None:
    check_company_changes_nothing(torch_executor, tiny_llama_dir, NUM_BLOCKS, BLOCK_SIZE)


def check_company_changes_nothing(
    make: MakeExecutor, directory: Path, num_blocks: int, block_size: int, count: int = 6
) -> None:
    """Some sequences and a text to score in a pool that is too small for them, then each by itself."""
    scale = block_size // BLOCK_SIZE  # prompts that fill and share blocks of any size
    shared = [11, 45, 3, 99, 7, 23, 64, 5, 81] * scale
    requests = [
        SequenceRequest(
            id=number,
            prompt=[*shared[: (4 + number) * scale], number],
            sampling=SamplingParams(max_tokens=14, seed=number, temperature=number % 2 * 0.9, num_logprobs=0),
        )
        for number in range(count)
    ]
    scoring = SequenceRequest(id=count, prompt=[*shared, *range(12)], sampling=SamplingParams(max_tokens=1), score=True)
    engine, together = run(
        make,
        directory,
        [*requests, scoring],
        num_blocks,
        block_size,
        max_num_batched_tokens=6 * scale,
        max_num_seqs=4,
        max_logit_rows=5 * scale,
    )
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prefix_hits > 0
    for request, tokens in zip([*requests, scoring], together, strict=True):
        _, (alone,) = run(make, directory, [request], num_blocks, block_size, enable_prefix_cache=False)
        assert [token.token_id for token in tokens] == [token.token_id for token in alone]
        for token, other in zip(tokens, alone, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
