"""The default model, whole: greedy tokens beside `transformers`, perplexity beside llama.cpp, facts of the file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest
from headrace.kernels.quant import QuantTensor
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import FrontModel, LoadedModel, load_front, load_model
from headrace.models.weight_names import hf_names

from tests.support.stepping import step_batch

DATA = Path(__file__).parents[1] / "data"
BLOCK, NUM_BLOCKS = 16, 256
NUM_TOKENS = 64
QUESTIONS = (
    "What is the capital of France?",
    "Explain how a water wheel works.",
    "Write a short poem about rain.",
    "List three uses of copper.",
    "What is 12 times 12?",
    "Who wrote Hamlet?",
    "Translate 'good morning' into Spanish.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "What does HTTP stand for?",
    "Summarise the story of Cinderella in two sentences.",
    "How many legs has a spider?",
    "Write a Python function that reverses a string.",
    "What is photosynthesis?",
    "Name the planets of the solar system.",
    "How do I boil an egg?",
    "What is the difference between a list and a tuple?",
    "Tell me a joke about cats.",
    "Who was Marie Curie?",
    "Describe the sea to somebody who has never seen it.",
)


@pytest.fixture(scope="module")
def model(smollm2_path: Path) -> LoadedModel:
    return load_model(smollm2_path)


@pytest.fixture(scope="module")
def front(smollm2_path: Path) -> FrontModel:
    return load_front(smollm2_path)


@pytest.fixture(scope="module")
def executor(model: LoadedModel) -> TorchExecutor:
    return TorchExecutor(model.program, model.weights, num_blocks=NUM_BLOCKS, block_size=BLOCK)


def test_facts(front: FrontModel, smollm2_path: Path) -> None:
    info = front.info
    assert (info.architecture, info.parameters, info.quantization) == ("llama", 134_515_008, "Q4_1")
    assert (info.context_length, info.vocab_size) == (8192, 49_152)
    assert info.eos_token_ids[0] == 2
    assert info.file_bytes == smollm2_path.stat().st_size
    assert "<|im_start|>" in info.chat_template
    assert front.chat_template is not None
    prompt = front.chat_template.render([{"role": "user", "content": "Hello"}], True)
    assert prompt.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


def _reference(model: LoadedModel) -> torch.nn.Module:
    """transformers' Llama with our dequantised weights."""
    config = model.config
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=len(config.layers),
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.layers[0].rope.theta},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
    )
    reference = transformers.LlamaForCausalLM(hf_config)
    dense = {
        name: torch.from_numpy(weight.dequantize() if isinstance(weight, QuantTensor) else np.array(weight))
        for name, weight in model.weights.items()
    }
    state = {hf_name: dense[name] for name, hf_name in hf_names(config).items()}
    assert reference.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]  # tied
    return reference.eval()


def _reference_tokens(reference: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, all prompts in one batch padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = reference.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            pad_token_id=0,
        )
    return [row[longest:].tolist() for row in out]


@pytest.mark.slow
def test_greedy_tokens_agree_with_transformers(
    model: LoadedModel, front: FrontModel, executor: TorchExecutor, record_property: pytest.RecordProperty
) -> None:
    assert front.chat_template is not None
    texts = [front.chat_template.render([{"role": "user", "content": question}], True) for question in QUESTIONS]
    prompts = [front.tokenizer.encode(text, add_bos=False, parse_special=True) for text in texts]
    config = EngineConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK, max_model_len=1024, max_num_seqs=len(prompts))
    engine = Engine(executor, config)
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add(SequenceRequest(i, prompt, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)))
    while engine.has_work():
        for output in engine.step():
            tokens[output.id] += [token.token_id for token in output.tokens]
    wanted = _reference_tokens(_reference(model), prompts)
    pairs = [pair for ours, theirs in zip(tokens, wanted, strict=True) for pair in zip(ours, theirs, strict=True)]
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    record_property("greedy_agreement", agreement)
    print(f"greedy agreement with transformers: {agreement:.4f} of {len(pairs)} tokens")
    assert len(pairs) == len(QUESTIONS) * NUM_TOKENS
    assert agreement >= 0.95


@pytest.mark.slow
def test_perplexity_is_that_of_llama_cpp(executor: TorchExecutor, record_property: pytest.RecordProperty) -> None:
    recorded = json.loads((DATA / "llama_cpp_perplexity.json").read_text())
    width = recorded["window_tokens"]
    logprobs = []
    for window in range(recorded["windows"]):
        ids = recorded["tokens"][window * width : (window + 1) * width]
        table = list(range(NUM_BLOCKS))[window::4]  # every window on blocks of its own, scattered
        for start in range(0, width, 128):
            batch = step_batch([(ids[start : start + 128], start, table)], BLOCK)
            logits = executor.forward(batch).astype(np.float64)
            targets = ids[start + 1 : start + 129]
            rows = logits[: len(targets)]
            highest = rows.max(1)
            log_sums = highest + np.log(np.exp(rows - highest[:, None]).sum(1))
            logprobs += (rows[np.arange(len(targets)), targets] - log_sums).tolist()
    assert len(logprobs) == recorded["windows"] * (width - 1)
    perplexity = math.exp(-sum(logprobs) / len(logprobs))
    record_property("perplexity", perplexity)
    print(f"perplexity {perplexity:.4f}, llama.cpp's {recorded['perplexity']:.4f}")
    assert perplexity == pytest.approx(recorded["perplexity"], rel=0.005)
    # Token by token as well: a compensating error would pass the mean. llama.cpp's int8 activations are worth ~0.1.
    first = recorded["first_logprobs"]
    assert np.abs(np.array(logprobs[: len(first)]) - first).mean() < 0.1
