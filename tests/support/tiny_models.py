"""Tiny random models of every architecture, made on the spot: as Hugging Face directories and as GGUF files.

Called by the session fixtures of tests/conftest.py. The directory is written by `transformers` and the GGUF by the
`gguf` package's writer and tensor name map (what llama.cpp's converter uses), so neither knows our loaders: together
they are the outside opinion on names, shapes, the permuted rows of q and k, and Gemma's folded norms. Seeds are fixed.
Norm weights and biases are random too: a forgotten norm or bias must change the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 384
CONTEXT_LENGTH = 512
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2; BOS is 1 and EOS 2, as in SmolLM2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRAINING_TEXT = (
    "The headrace is the channel that leads water to the wheel. Water runs down the headrace, turns the wheel, and "
    "leaves by the tailrace. When the gate is closed the wheel stands still; when it is opened the wheel turns again.\n"
    "In 1769 and in 1843 the mill was rebuilt; it had 12 stones, 3 wheels and 1 miller, who wouldn't leave.\n"
    "def turn(wheel, water):\n    return wheel.turn(water) if water > 0 else None\n"
    "Größe, café, naïve, Москва, 東京, 🙂 and other words are written here as well, so that bytes are seen.\n"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
}
_SMALL: dict[str, Any] = {
    **_SHAPE,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def _llama() -> transformers.PreTrainedConfig:
    return transformers.LlamaConfig(
        **_SHAPE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )


def _llama_smallest() -> transformers.PreTrainedConfig:
    """For kernels in an interpreter, where a step of the others takes seconds."""
    return transformers.LlamaConfig(
        **{**_SHAPE, "initializer_range": 0.3},  # with less of it so small a model says one token for ever
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
    )


def _llama3() -> transformers.PreTrainedConfig:
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    return transformers.LlamaConfig(**_SMALL, rope_parameters=rope, tie_word_embeddings=False)


def _llama_linear() -> transformers.PreTrainedConfig:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    return transformers.LlamaConfig(**_SMALL, rope_parameters=rope, tie_word_embeddings=False)


def _mistral() -> transformers.PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    return transformers.MistralConfig(**_SMALL, sliding_window=24, rope_parameters=rope, tie_word_embeddings=False)


def _qwen2() -> transformers.PreTrainedConfig:
    shape = {key: value for key, value in _SMALL.items() if key != "head_dim"}  # Qwen2 derives it
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return transformers.Qwen2Config(**shape, rope_parameters=rope, tie_word_embeddings=True)


def _qwen2_wide() -> transformers.PreTrainedConfig:
    """Heads of 32, the least that the GPU's kernels take, and biases."""
    shape = {key: value for key, value in _SMALL.items() if key != "head_dim"}
    shape |= {"num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return transformers.Qwen2Config(**shape, rope_parameters=rope, tie_word_embeddings=True)


def _qwen3() -> transformers.PreTrainedConfig:
    shape = {**_SMALL, "head_dim": 32}  # head_dim apart from hidden_size / num_attention_heads
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    return transformers.Qwen3Config(**shape, rope_parameters=rope, tie_word_embeddings=False)


def _gemma3(attention_soft_cap: float | None = None) -> transformers.PreTrainedConfig:
    shape = {**_SMALL, "num_hidden_layers": 7, "head_dim": 32}  # layer 5 (counted from 0) is the global one
    return transformers.Gemma3TextConfig(
        **shape,
        sliding_window=24,
        query_pre_attn_scalar=32,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        final_logit_softcapping=4.0,
        attn_logit_softcapping=attention_soft_cap,
        tie_word_embeddings=True,
    )


CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "llama": _llama,
    "llama-smallest": _llama_smallest,
    "llama3": _llama3,
    "llama-linear": _llama_linear,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen2-wide": _qwen2_wide,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "gemma3-capped": lambda: _gemma3(attention_soft_cap=1.5),
}
ARCHITECTURES = ("llama", "llama3", "llama-linear", "mistral", "qwen2", "qwen3", "gemma3")


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE of SmolLM2's kind (single digits, GPT-2's splitting), exactly VOCAB_SIZE tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TRAINING_TEXT] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def write_directory(architecture: str, path: Path, *, max_shard_size: str = "1GB") -> Path:
    """Write the tiny model as a Hugging Face directory: config.json, safetensors, tokenizer.json, chat template.

    A small `max_shard_size` ("300KB") makes several shards and an index.
    """
    torch.manual_seed(20)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    train_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "add_bos_token": False,
        "model_max_length": CONTEXT_LENGTH,
        "chat_template": CHAT_TEMPLATE,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return path


def write_gguf(
    directory: Path, path: Path, quantization: str = "F32", *, permute: bool = True, leave_out: tuple[str, ...] = ()
) -> Path:
    """Write the model of `directory` as a GGUF file, as llama.cpp's converter would.

    quantization: a type that the gguf package can quantise to (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0), for matrices.
    `permute=False` and `leave_out` (GGUF tensor names) make files that are wrong on purpose.
    """
    config = json.loads((directory / "config.json").read_text())
    arch = {"llama": "llama", "mistral": "llama", "gemma3_text": "gemma3"}.get(
        config["model_type"], config["model_type"]
    )
    writer = gguf.GGUFWriter(path, arch)
    _write_model_metadata(writer, config)
    _write_tokenizer_metadata(writer, directory)
    model_arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch)
    names = gguf.get_tensor_name_map(model_arch, config["num_hidden_layers"])
    quant = gguf.GGMLQuantizationType[quantization]
    for hf_name, tensor in sorted(_read_tensors(directory).items()):
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        if name in leave_out:
            continue
        if arch == "llama" and permute and ".attn_q." in name:
            tensor = permute_rows(tensor, config["num_attention_heads"])
        if arch == "llama" and permute and ".attn_k." in name:
            tensor = permute_rows(tensor, config["num_key_value_heads"])
        if arch == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor + np.float32(1.0)
        if tensor.ndim == 2 and quantization != "F32":
            writer.add_tensor(name, gguf.quantize(tensor, quant), raw_dtype=quant)
        else:
            writer.add_tensor(name, tensor)
    factors = _llama3_factors(config)
    if factors is not None and "rope_freqs.weight" not in leave_out:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute_rows(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Order the rows of q or k for rotary embedding of neighbours (2i, 2i + 1) instead of halves."""
    rows, width = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, width).swapaxes(1, 2).reshape(rows, width).copy()


def _read_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def _write_model_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config["model_type"] in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if config.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])


def _llama3_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What the converter writes as rope_freqs.weight: the base frequencies divided by Llama 3's scaled ones."""
    rope = config["rope_parameters"]
    if rope.get("rope_type") != "llama3":
        return None
    base = 1.0 / rope["rope_theta"] ** (np.arange(0, config["head_dim"], 2) / config["head_dim"])
    parsed = transformers.LlamaConfig(**{k: v for k, v in config.items() if k not in ("architectures", "model_type")})
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](parsed, torch.device("cpu"))
    return (base / scaled.double().numpy()).astype(np.float32)


def _write_tokenizer_metadata(writer: gguf.GGUFWriter, directory: Path) -> None:
    data = json.loads((directory / "tokenizer.json").read_text())
    vocab = sorted(data["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in data["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for _, i in vocab])
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
