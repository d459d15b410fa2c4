"""Writes a GGUF file as a Hugging Face directory, for the peers that do not read GGUF. Called by `install.py`.

The weights are those of our own loader, dequantised (q and k already unpermuted), in float32 or bfloat16; the tokenizer
is the file's own. So every peer runs the same model, and a peer that quantises starts from the same numbers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from headrace.kernels.quant import QuantTensor
from headrace.models.config import ModelConfig
from headrace.models.gguf import GGUFFile
from headrace.models.load import load_front, load_model
from headrace.models.tokenizer_gguf import read_gguf
from headrace.models.weight_names import hf_names
from tokenizers import decoders


def write_hf_directory(gguf: Path, directory: Path, dtype: str) -> None:
    """Writes `directory` as a whole or not at all. dtype: "float32" or "bfloat16"."""
    import torch
    from safetensors.torch import save_file

    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = load_model(gguf)
    tensors = {}
    for name, hf_name in hf_names(model.config).items():
        weight = model.weights[name]
        dense = weight.dequantize() if isinstance(weight, QuantTensor) else np.array(weight)
        tensors[hf_name] = torch.from_numpy(dense).to(getattr(torch, dtype)).contiguous()
    save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
    front = load_front(gguf)
    _write(partial / "config.json", _config(model.config, front.info.eos_token_ids[0], dtype))
    _write_tokenizer(gguf, partial, front.info.chat_template)
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _config(config: ModelConfig, eos: int, dtype: str) -> dict[str, Any]:
    if config.architecture != "llama":
        raise ValueError(f"the bench converts llama models, not {config.architecture}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": "silu",
        "rope_theta": config.layers[0].rope.theta,
        "tie_word_embeddings": config.is_tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def _write_tokenizer(gguf: Path, directory: Path, chat_template: str) -> None:
    file = GGUFFile.open(gguf)
    try:
        parts = read_gguf(file.metadata)
    finally:
        file.close()
    parts.parsing.decoder = decoders.ByteLevel()
    parts.parsing.save(str(directory / "tokenizer.json"))
    texts = parts.texts
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 8192,
        "bos_token": texts[parts.bos_id if parts.bos_id is not None else parts.eos_ids[0]],
        "eos_token": texts[parts.eos_ids[0]],
        "unk_token": texts[0],
        "pad_token": texts[parts.eos_ids[0]],
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template,
    }
    _write(directory / "tokenizer_config.json", settings)
    names = {key: settings[key] for key in ("bos_token", "eos_token", "unk_token", "pad_token")}
    _write(directory / "special_tokens_map.json", names)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))
