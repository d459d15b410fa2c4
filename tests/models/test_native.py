"""The numbers of the model on the native executor: beside `transformers`, beside the torch executor, and as text.

The measure is max |ours - theirs| / max |theirs|. Dense weights leave float32 rounding. Quantised weights are compared
with float32 activations on the same weights: 8-bit activations (a rounding error of up to 1/254 of each group's largest
value, at every product) leave a few per cent in these tiny models with their random weights, 16-bit ones 1/256 of that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import FinishOutput, SamplingParams, SequenceRequest, TokenOutput
from headrace.kernels.native import library
from headrace.kernels.native.executor import KV_DTYPES, NativeExecutor, pack
from headrace.kernels.native.fuse import lower
from headrace.kernels.native.ops import form_of
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import LoadedModel, load_front, load_model

from tests.conftest import TinyModels
from tests.support.reference import reference_logits, shared_reference
from tests.support.stepping import logits_in_chunks, step_batch
from tests.support.tiny_models import ARCHITECTURES, VOCAB_SIZE

BLOCK = 16
TOKENS = np.random.default_rng(21).integers(3, VOCAB_SIZE, 100).tolist()
TABLE = [5, 3, 9, 1, 12, 7, 11]
KV_TOLERANCE = {"fp32": 0.0, "fp16": 5e-3, "bf16": 4e-2, "int8": 8e-2}
QUANTIZATIONS = ("Q4_0", "Q4_1", "Q5_0", "Q8_0")


def error(got: np.ndarray, want: np.ndarray) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def native_logits(model: LoadedModel, chunk: int = 33, **options: object) -> np.ndarray:
    options = {"kv_dtype": "fp32", "num_threads": 2, **options}
    executor = NativeExecutor(model.program, model.weights, num_blocks=16, block_size=BLOCK, **options)  # type: ignore[arg-type]
    try:
        return logits_in_chunks(executor, TOKENS, chunk, TABLE, BLOCK)  # type: ignore[arg-type]
    finally:
        executor.close()


@pytest.fixture(scope="module")
def torch_logits(tiny_models: TinyModels) -> Callable[[str, str], np.ndarray]:
    @functools.cache
    def compute(architecture: str, quantization: str) -> np.ndarray:
        model = load_model(tiny_models.gguf(architecture, quantization))
        executor = TorchExecutor(model.program, model.weights, num_blocks=16, block_size=BLOCK)
        return logits_in_chunks(executor, TOKENS, 100, TABLE, BLOCK)

    return compute


@pytest.mark.parametrize("source", ["safetensors", "gguf"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_weights_agree_with_transformers(architecture: str, source: str, tiny_models: TinyModels) -> None:
    directory = tiny_models.directory(architecture)
    model = load_model(directory if source == "safetensors" else tiny_models.gguf(architecture))
    want = reference_logits(shared_reference(directory), TOKENS)
    assert error(native_logits(model), want) < 2e-5


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3-capped"])
def test_every_kv_dtype(
    architecture: str, kv_dtype: str, tiny_models: TinyModels, torch_logits: Callable[[str, str], np.ndarray]
) -> None:
    model = load_model(tiny_models.gguf(architecture))
    want = torch_logits(architecture, "F32")
    assert error(native_logits(model, kv_dtype=kv_dtype), want) < 2e-5 + KV_TOLERANCE[kv_dtype]


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma3-capped"])
def test_quantised_weights_agree_with_the_torch_executor(
    architecture: str, quantization: str, tiny_models: TinyModels, torch_logits: Callable[[str, str], np.ndarray]
) -> None:
    model = load_model(tiny_models.gguf(architecture, quantization))
    want = torch_logits(architecture, quantization)
    narrow, wide = native_logits(model), native_logits(model, activation_bits=16)
    assert error(wide, want) < 1e-3
    assert error(narrow, want) < 0.15
    assert error(wide, narrow) > 1e-3  # the switch does something


@pytest.mark.parametrize("quantization", ["F32", "Q4_1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_fused_means_the_same(architecture: str, quantization: str, tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.gguf(architecture, quantization))
    forms = {name: form_of(weight) for name, weight in model.weights.items() if len(weight.shape) == 2}
    program = lower(model.program, forms)
    executor = NativeExecutor.of_native(
        program, pack(program, forms, model.weights), num_blocks=16, block_size=BLOCK, num_threads=2
    )
    got = logits_in_chunks(executor, TOKENS, 33, TABLE, BLOCK)  # type: ignore[arg-type]
    np.testing.assert_array_equal(got, native_logits(model))


# ---- Through the engine: chunks, prefix hits, preemption ----

RNG = np.random.default_rng(22)
SHARED = RNG.integers(3, VOCAB_SIZE, 2 * BLOCK + 5).tolist()
PROMPTS = [SHARED + RNG.integers(3, VOCAB_SIZE, n).tolist() for n in (1, 20, 11, 40)]
PROMPTS.append(RNG.integers(3, VOCAB_SIZE, 3).tolist())
NUM_TOP = 5


def run_engine(
    model: LoadedModel, requests: list[SequenceRequest], **limits: int | bool
) -> tuple[Engine, list[list[TokenOutput]]]:
    num_blocks = int(limits.pop("num_blocks", 64))
    executor = NativeExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=BLOCK, num_threads=2)
    config = EngineConfig(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_model_len=256,
        vocab_size=model.info.vocab_size,
        **limits,  # type: ignore[arg-type]
    )
    engine = Engine(executor, config)
    tokens: dict[int, list[TokenOutput]] = {request.id: [] for request in requests}
    finishes: dict[int, FinishOutput] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for output in engine.step():
            tokens[output.id] += output.tokens
            if output.finish is not None:
                finishes[output.id] = output.finish
        engine.check_integrity()
    executor.close()
    assert {finish.reason for finish in finishes.values()} == {"length"}
    return engine, list(tokens.values())


@pytest.mark.parametrize(
    ("architecture", "quantization"), [("llama", "Q4_1"), ("gemma3", "Q8_0"), ("mistral", "Q4_0"), ("qwen3", "F32")]
)
def test_company_chunks_hits_and_preemption_change_nothing(
    architecture: str, quantization: str, tiny_models: TinyModels
) -> None:
    """Tokens, their log-probabilities and those of the most likely ones are equal to the bit."""
    model = load_model(tiny_models.gguf(architecture, quantization))
    requests = [
        SequenceRequest(
            i,
            prompt,
            SamplingParams(max_tokens=24, seed=i, temperature=i % 2 * 0.8, num_logprobs=NUM_TOP),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    scored = SequenceRequest(len(PROMPTS), PROMPTS[3], SamplingParams(max_tokens=1, num_logprobs=1), score=True)
    requests.append(scored)
    engine, together = run_engine(
        model, requests, num_blocks=14, max_num_batched_tokens=48, max_num_seqs=6, max_logit_rows=7
    )
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prefix_hits > 0
    assert engine.stats().num_step_failures == 0
    for request, tokens in zip(requests, together, strict=True):
        _, (alone,) = run_engine(model, [request], enable_prefix_cache=False)
        assert tokens == alone
        assert all(token.logprob <= 0.0 for token in tokens)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_are_those_of_transformers(architecture: str, tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.gguf(architecture))
    sampling = SamplingParams(max_tokens=16, temperature=0.0, num_logprobs=NUM_TOP)
    requests = [SequenceRequest(i, prompt, sampling) for i, prompt in enumerate(PROMPTS)]
    _, outputs = run_engine(model, requests, max_num_batched_tokens=64)
    reference = shared_reference(tiny_models.directory(architecture))
    for prompt, tokens in zip(PROMPTS, outputs, strict=True):
        ids = [token.token_id for token in tokens]
        rows = reference_logits(reference, prompt + ids)[len(prompt) - 1 : -1].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        best = np.sort(rows, axis=-1)[:, ::-1]
        for token, row, top in zip(tokens, rows, best, strict=True):
            # fp16 keys and values may swap tokens that are as good as equal.
            assert row[token.token_id] > top[0] - 0.02
            assert token.logprob == pytest.approx(row[token.token_id], abs=0.02)
            assert [p for _, p in token.top] == pytest.approx(top[:NUM_TOP].tolist(), abs=0.02)


# ---- The default model ----


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path)


def test_the_default_model_answers(smollm2: LoadedModel, smollm2_path: Path) -> None:
    front = load_front(smollm2_path)
    assert front.chat_template is not None
    question = [{"role": "user", "content": "What does HTTP stand for?"}]
    prompt = front.tokenizer.encode(front.chat_template.render(question, True), add_bos=False, parse_special=True)
    executor = NativeExecutor(smollm2.program, smollm2.weights, num_blocks=32, block_size=BLOCK, num_threads=2)
    engine = Engine(executor, EngineConfig(num_blocks=32, block_size=BLOCK, max_model_len=256))
    engine.add(SequenceRequest(0, prompt, SamplingParams(max_tokens=24, temperature=0.0, stop_token_ids=(2,))))
    ids: list[int] = []
    while engine.has_work():
        for output in engine.step():
            ids += [token.token_id for token in output.tokens]
    text = front.tokenizer.decode(ids)
    assert "Hypertext Transfer Protocol" in text, text


@pytest.mark.slow
def test_the_default_model_agrees_with_the_torch_executor(smollm2: LoadedModel, smollm2_path: Path) -> None:
    """Log-probabilities of a text's tokens: 8-bit activations are worth less than 0.1 each, 16-bit ones 1 % of that."""
    front = load_front(smollm2_path)
    text = "The headrace is the channel that leads water to the wheel. Water runs down the headrace, turns the wheel."
    ids = front.tokenizer.encode(text, add_bos=False, parse_special=False)
    batch = step_batch([(ids, 0, [3, 1])], 32)

    def logprobs(executor: NativeExecutor | TorchExecutor) -> np.ndarray:
        logits = executor.forward(batch).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return rows[np.arange(len(ids) - 1), ids[1:]]

    make = functools.partial(NativeExecutor, smollm2.program, smollm2.weights, num_blocks=4, block_size=32)
    want = logprobs(TorchExecutor(smollm2.program, smollm2.weights, num_blocks=4, block_size=32))
    narrow, wide = logprobs(make()), logprobs(make(activation_bits=16, kv_dtype="fp32"))
    assert np.abs(wide - want).mean() < 1e-3
    assert np.abs(narrow - want).mean() < 0.1


@pytest.mark.slow
def test_the_default_model_has_the_same_bits_on_every_instruction_set(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = step_batch([([504, 913, 8656, 314, 253], 0, [1]), ([19], 0, [2])], BLOCK)
    results = {}
    for isa in library.info().usable:
        monkeypatch.setenv(library.ISA_VARIABLE, isa)
        executor = NativeExecutor(smollm2.program, smollm2.weights, num_blocks=4, block_size=BLOCK, num_threads=2)
        results[isa] = executor.forward(batch)
        executor.close()
    want = results.pop("generic")
    for isa, got in results.items():
        np.testing.assert_array_equal(got, want, err_msg=isa)
