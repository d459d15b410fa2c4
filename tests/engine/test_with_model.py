"""The engine on the torch executor and a tiny model: company, chunks, hits and preemption change no real token."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest, TokenOutput

NUM_BLOCKS, BLOCK_SIZE = 14, 4


def run(
    directory: Path, requests: list[SequenceRequest], **limits: int | bool
) -> tuple[Engine, list[list[TokenOutput]]]:
    from headrace.kernels.torch_executor import TorchExecutor
    from headrace.models.load import load_model

    model = load_model(directory)
    executor = TorchExecutor(model.program, model.weights, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    config = EngineConfig(
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=48,
        vocab_size=model.info.vocab_size,
        **limits,  # type: ignore[arg-type]
    )
    engine = Engine(executor, config)
    for request in requests:
        engine.add(request)
    tokens: dict[int, list[TokenOutput]] = {request.id: [] for request in requests}
    while engine.has_work():
        for output in engine.step():
            tokens[output.id] += output.tokens
    engine.check_integrity()
    return engine, list(tokens.values())


def test_tokens_and_log_probabilities_are_those_of_a_solo_run(tiny_llama_dir: Path) -> None:
    shared = [11, 45, 3, 99, 7, 23, 64, 5, 81]
    requests = [
        SequenceRequest(
            id=number,
            prompt=[*shared[: 4 + number], number],
            sampling=SamplingParams(max_tokens=14, seed=number, temperature=number % 2 * 0.9, num_logprobs=0),
        )
        for number in range(6)
    ]
    scoring = SequenceRequest(id=6, prompt=[*shared, *range(12)], sampling=SamplingParams(max_tokens=1), score=True)
    engine, together = run(
        tiny_llama_dir, [*requests, scoring], max_num_batched_tokens=6, max_num_seqs=4, max_logit_rows=5
    )
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prefix_hits > 0
    for request, tokens in zip([*requests, scoring], together, strict=True):
        _, (alone,) = run(tiny_llama_dir, [request], enable_prefix_cache=False)
        assert [token.token_id for token in tokens] == [token.token_id for token in alone]
        for token, other in zip(tokens, alone, strict=True):
            assert token.logprob == pytest.approx(other.logprob, abs=1e-4)
