"""The metadata keys that Headrace reads from a GGUF file, each with its one allowed kind and its range.

Called by `gguf_header.py` for every key. A value of the wrong kind would otherwise surface far from here as a
TypeError (llama.cpp had memory errors of this class); an unknown key is left alone, nothing reads it.
Names: the GGUF specification and llama.cpp's `llama-arch.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Kind = Literal["integer", "float", "bool", "string", "integer[]", "float[]", "bool[]", "string[]"]

_I31 = 2**31 - 1


@dataclass(frozen=True)
class KeyRule:
    """`kinds` allowed; integers (elements too) lie in low..high; a string holds at most `max_bytes`."""

    kinds: tuple[Kind, ...]
    low: int = 0
    high: int = _I31
    max_bytes: int = 16 * 2**20


_STRING = KeyRule(("string",), max_bytes=2**16)
_BOOL = KeyRule(("bool",))
_FLOAT = KeyRule(("float",))
_COUNT = KeyRule(("integer",))
_TOKEN_ID = KeyRule(
    ("integer",), low=-1, high=2**32 - 1
)  # both mean "none" to some writers; the tokenizer knows its ids


def _size(high: int, *, per_layer: bool = False) -> KeyRule:
    return KeyRule(("integer", "integer[]") if per_layer else ("integer",), low=1, high=high)


_EXACT: Mapping[str, KeyRule] = MappingProxyType(
    {
        "general.architecture": KeyRule(("string",), max_bytes=64),
        "general.name": _STRING,
        "general.file_type": _COUNT,
        "general.quantization_version": _COUNT,
        "general.parameter_count": KeyRule(("integer",), high=2**48),
        "split.no": _COUNT,
        "split.count": _COUNT,
        "split.tensors.count": _COUNT,
        "tokenizer.chat_template": KeyRule(("string",), max_bytes=2**16),
        "tokenizer.ggml.model": KeyRule(("string",), max_bytes=64),
        "tokenizer.ggml.pre": KeyRule(("string",), max_bytes=64),
        "tokenizer.ggml.tokens": KeyRule(("string[]",)),
        "tokenizer.ggml.merges": KeyRule(("string[]",)),
        "tokenizer.ggml.scores": KeyRule(("float[]",)),
        "tokenizer.ggml.token_type": KeyRule(("integer[]",), high=255),
        "tokenizer.ggml.token_type_count": _COUNT,
        "tokenizer.ggml.eos_token_ids": KeyRule(("integer[]",), high=2**24),
        "tokenizer.ggml.remove_extra_whitespaces": _BOOL,
        "tokenizer.ggml.escape_whitespaces": _BOOL,
    }
)

# Keys that begin with the name of the architecture, without that prefix.
_OF_ARCHITECTURE: Mapping[str, KeyRule] = MappingProxyType(
    {
        "block_count": _size(4096),
        "context_length": _size(_I31),
        "embedding_length": _size(2**20),
        "feed_forward_length": _size(2**24, per_layer=True),
        "vocab_size": _size(2**24),
        "attention.head_count": _size(2**16, per_layer=True),
        "attention.head_count_kv": _size(2**16, per_layer=True),
        "attention.key_length": _size(2**16),
        "attention.value_length": _size(2**16),
        "attention.layer_norm_rms_epsilon": _FLOAT,
        "attention.layer_norm_epsilon": _FLOAT,
        "attention.scale": _FLOAT,
        "attention.causal": _BOOL,
        "attention.sliding_window": _COUNT,
        "attention.sliding_window_pattern": KeyRule(("integer", "integer[]", "bool[]")),
        "attn_logit_softcapping": _FLOAT,
        "final_logit_softcapping": _FLOAT,
        "embedding_scale": _FLOAT,
        "residual_scale": _FLOAT,
        "logit_scale": _FLOAT,
        "expert_count": _COUNT,
        "expert_used_count": _COUNT,
        "rope.dimension_count": _size(2**16),
        "rope.freq_base": _FLOAT,
        "rope.freq_base_swa": _FLOAT,
        "rope.local.freq_base": _FLOAT,
        "rope.scale_linear": _FLOAT,
        "rope.scaling.type": KeyRule(("string",), max_bytes=64),
        "rope.scaling.factor": _FLOAT,
        "rope.scaling.attn_factor": _FLOAT,
        "rope.scaling.original_context_length": _size(_I31),
        "rope.scaling.finetuned": _BOOL,
    }
)


def rule_for(key: str) -> KeyRule | None:
    """The rule of a key, or None where nothing is known of it."""
    rule = _EXACT.get(key)
    if rule is not None:
        return rule
    if key.startswith("tokenizer.chat_template."):
        return _EXACT["tokenizer.chat_template"]
    if key.startswith("tokenizer.ggml."):
        if key.endswith("_token_id"):
            return _TOKEN_ID
        return _BOOL if key.startswith("tokenizer.ggml.add_") else None
    return _OF_ARCHITECTURE.get(key.partition(".")[2])
