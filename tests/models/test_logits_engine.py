"""The same numbers through the engine: chunked prefill, prefix-cache hits, preemption and recomputation.

Every generated token must be the greedy one of `transformers` over the whole text before it, and the log-probabilities
of the most likely tokens must be its too, whatever chunks, blocks and neighbours the scheduler chose.
"""

from __future__ import annotations

import numpy as np
import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import FinishOutput, SamplingParams, SequenceRequest, TokenOutput
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import load_model

from tests.conftest import TinyModels
from tests.support.reference import reference_logits, shared_reference
from tests.support.tiny_models import VOCAB_SIZE

BLOCK = 16
NUM_TOP = 5
RNG = np.random.default_rng(22)
SHARED = RNG.integers(3, VOCAB_SIZE, 2 * BLOCK + 5).tolist()
PROMPTS = [SHARED + RNG.integers(3, VOCAB_SIZE, n).tolist() for n in (1, 20, 11, 40)]
PROMPTS.append(RNG.integers(3, VOCAB_SIZE, 3).tolist())


def open_engine(tiny_models: TinyModels, architecture: str, *, budget: int, num_blocks: int) -> Engine:
    model = load_model(tiny_models.gguf(architecture))
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_model_len=256,
        max_num_batched_tokens=budget,
        max_num_seqs=min(budget, len(PROMPTS)),
    )
    return Engine(TorchExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=BLOCK), config)


def run(engine: Engine, requests: list[SequenceRequest]) -> dict[int, list[TokenOutput]]:
    tokens: dict[int, list[TokenOutput]] = {request.id: [] for request in requests}
    finishes: dict[int, FinishOutput] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            tokens[output.id] += output.tokens
            if output.finish is not None:
                assert output.id not in finishes
                finishes[output.id] = output.finish
        engine.check_integrity()
    assert {finish.reason for finish in finishes.values()} == {"length"}
    return tokens


def generate(engine: Engine, max_tokens: int = 24) -> list[list[TokenOutput]]:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, num_logprobs=NUM_TOP)
    requests = [SequenceRequest(i, prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    outputs = run(engine, requests)
    return [outputs[i] for i in range(len(PROMPTS))]


def reference_logprobs(tiny_models: TinyModels, architecture: str, token_ids: list[int]) -> np.ndarray:
    logits = reference_logits(shared_reference(tiny_models.directory(architecture)), token_ids).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def check(tiny_models: TinyModels, architecture: str, outputs: list[list[TokenOutput]], max_tokens: int = 24) -> None:
    for prompt, tokens in zip(PROMPTS, outputs, strict=True):
        ids = [token.token_id for token in tokens]
        assert len(ids) == max_tokens
        rows = reference_logprobs(tiny_models, architecture, prompt + ids)[len(prompt) - 1 : -1]
        assert ids == rows.argmax(-1).tolist()
        for token, row in zip(tokens, rows, strict=True):
            best = np.argsort(-row, kind="stable")[:NUM_TOP]
            assert [i for i, _ in token.top] == best.tolist()
            assert [p for _, p in token.top] == pytest.approx(row[best].tolist(), abs=1e-4)
            assert token.logprob == pytest.approx(row[token.token_id], abs=1e-4)


@pytest.mark.parametrize("budget", [1, 7, BLOCK - 1, BLOCK, BLOCK + 1])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_chunks_of_every_size(architecture: str, budget: int, tiny_models: TinyModels) -> None:
    engine = open_engine(tiny_models, architecture, budget=budget, num_blocks=64)
    check(tiny_models, architecture, generate(engine, 8), 8)


@pytest.mark.parametrize("architecture", ["llama3", "mistral", "qwen2", "qwen3", "gemma3"])
def test_prefix_hits_and_preemption(architecture: str, tiny_models: TinyModels) -> None:
    engine = open_engine(tiny_models, architecture, budget=64, num_blocks=14)
    outputs = generate(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_prefix_hits > 0
    check(tiny_models, architecture, outputs)


def test_scored_text(tiny_models: TinyModels) -> None:
    engine = open_engine(tiny_models, "qwen3", budget=17, num_blocks=64)
    sampling = SamplingParams(max_tokens=1, num_logprobs=1)
    [outputs] = run(engine, [SequenceRequest(0, PROMPTS[3], sampling, score=True)]).values()
    rows = reference_logprobs(tiny_models, "qwen3", PROMPTS[3])[:-1]
    assert [token.token_id for token in outputs] == PROMPTS[3][1:]
    want = rows[np.arange(len(rows)), PROMPTS[3][1:]]
    assert [token.logprob for token in outputs] == pytest.approx(want.tolist(), abs=1e-4)
    assert [token.top[0][0] for token in outputs] == rows.argmax(-1).tolist()
