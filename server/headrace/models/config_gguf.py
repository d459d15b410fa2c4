"""GGUF metadata to `ModelConfig`. Called through `ModelConfig.from_gguf`.

Keys are those of llama.cpp's `llama-arch.cpp`. A key of the model's architecture that is not known here could change
the numbers, so it is refused by name. What llama.cpp hard-codes per architecture is in `_FAMILIES`, with its source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from headrace.models import config as limits
from headrace.models.config import Architecture, LayerConfig, ModelConfig
from headrace.models.files import TensorInfo, clip
from headrace.models.rope import RopeConfig
from headrace.models.settings import REQUIRED, Required, Settings


@dataclass(frozen=True)
class _Family:
    architecture: Architecture
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False


_FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama"),
    "qwen2": _Family("qwen2", qkv_bias=True),
    "qwen3": _Family("qwen3", qk_norm=True),
    "gemma3": _Family("gemma3", activation="gelu_tanh", qk_norm=True, sandwich_norms=True),
}
_KNOWN_KEYS = frozenset(
    {
        "attention.causal",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.scale",
        "attention.sliding_window",
        "attention.sliding_window_pattern",
        "attention.value_length",
        "attn_logit_softcapping",
        "block_count",
        "context_length",
        "embedding_length",
        "expert_count",
        "expert_used_count",
        "feed_forward_length",
        "final_logit_softcapping",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.freq_base_swa",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
        "rope.scaling.factor",
        "rope.scaling.finetuned",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "vocab_size",
    }
)
# llama.cpp (`llama-model.cpp`, LLM_ARCH_GEMMA3) takes these of Gemma 3 as given: 5 sliding layers, then a full one; the
# base of sliding layers; and for the 27B (62 layers) alone a query scale by hidden_size / num_heads, not head_dim.
_GEMMA3_PATTERN = 6
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA3_27B_LAYERS = 62


def read_config(metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo], file_name: str) -> ModelConfig:
    general = Settings(metadata, file_name)
    architecture = general.text("general.architecture")
    family = _FAMILIES.get(architecture)
    if family is None:
        raise general.unsupported(f"architecture {clip(architecture)}")
    settings = Settings(metadata, file_name, prefix=f"{architecture}.")
    _refuse_unsupported(settings)
    hidden = settings.integer("embedding_length", 1, limits.MAX_HIDDEN)
    heads = settings.integer("attention.head_count", 1, limits.MAX_HEADS, per_layer=True)
    kv_heads = settings.integer("attention.head_count_kv", 1, limits.MAX_HEADS, heads, per_layer=True)
    if heads % kv_heads:
        raise settings.inconsistent(f"attention.head_count {heads} is no multiple of head_count_kv {kv_heads}")
    head_dim = _head_dim(settings, hidden, heads)
    layers = _layers(settings, family)
    is_gemma = family.architecture == "gemma3"
    query_scale = hidden / heads if is_gemma and len(layers) == _GEMMA3_27B_LAYERS else float(head_dim)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=_vocab_size(settings, tensors),
        context_length=settings.integer("context_length", 1, limits.MAX_CONTEXT),
        hidden_size=hidden,
        intermediate_size=settings.integer("feed_forward_length", 1, limits.MAX_INTERMEDIATE, per_layer=True),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=layers,
        rms_norm_eps=settings.number("attention.layer_norm_rms_epsilon", 1e-12, 0.1),
        activation=family.activation,
        attention_scale=settings.number("attention.scale", 1e-6, 1e6, query_scale**-0.5),
        is_tied="output.weight" not in tensors,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sandwich_norms=family.sandwich_norms,
        embed_scale=float(np.float32(math.sqrt(hidden))) if is_gemma else 1.0,
        attention_soft_cap=settings.number("attn_logit_softcapping", 0.0, 1e6, 0.0),
        final_soft_cap=settings.number("final_logit_softcapping", 0.0, 1e6, 0.0),
    )


def _refuse_unsupported(settings: Settings) -> None:
    for key in settings.names():
        if key not in _KNOWN_KEYS:
            raise settings.unsupported(f"the setting {clip(key)}")
    if settings.integer("expert_count", 0, 1 << 20, 0) > 0:
        raise settings.unsupported("a mixture of experts")
    if not settings.flag("attention.causal", True):
        raise settings.unsupported("attention that is not causal")
    if settings.number("rope.scaling.attn_factor", 0.0, 1e6, 1.0) != 1.0:
        raise settings.unsupported("rope.scaling.attn_factor other than 1")


def _head_dim(settings: Settings, hidden: int, heads: int) -> int:
    default: int | Required = hidden // heads if hidden % heads == 0 else REQUIRED
    head_dim = settings.integer("attention.key_length", 2, limits.MAX_HEAD_DIM, default)
    if head_dim % 2:
        raise settings.inconsistent(f"head dimension {head_dim} is odd")
    if settings.integer("attention.value_length", 1, limits.MAX_HEAD_DIM, head_dim) != head_dim:
        raise settings.unsupported("attention.value_length other than attention.key_length")
    if settings.integer("rope.dimension_count", 1, limits.MAX_HEAD_DIM, head_dim) != head_dim:
        raise settings.unsupported("rope.dimension_count other than the head dimension")
    return head_dim


def _vocab_size(settings: Settings, tensors: Mapping[str, TensorInfo]) -> int:
    table = tensors.get("token_embd.weight")
    if table is None:
        raise settings.inconsistent("has no tensor token_embd.weight")
    vocab_size = settings.integer("vocab_size", 1, limits.MAX_VOCAB, table.shape[0])
    if vocab_size != table.shape[0]:
        raise settings.inconsistent(
            f"vocab_size {vocab_size} differs from the {table.shape[0]} rows of token_embd.weight"
        )
    return vocab_size


def _layers(settings: Settings, family: _Family) -> tuple[LayerConfig, ...]:
    count = settings.integer("block_count", 1, limits.MAX_LAYERS)
    window = settings.integer("attention.sliding_window", 0, limits.MAX_CONTEXT, 0)
    full_rope = _rope(settings)
    if family.architecture != "gemma3":
        if settings.has("attention.sliding_window_pattern"):
            raise settings.unsupported("attention.sliding_window_pattern")
        return (LayerConfig(window, full_rope),) * count
    if window == 0:
        raise settings.inconsistent("attention.sliding_window is missing")
    # The scaling is of the full layers alone.
    sliding = LayerConfig(window, RopeConfig(settings.number("rope.freq_base_swa", 1.0, 1e12, _GEMMA3_LOCAL_THETA)))
    full = LayerConfig(0, full_rope)
    is_sliding = settings.flags("attention.sliding_window_pattern", count)
    if is_sliding is None:
        pattern = settings.integer("attention.sliding_window_pattern", 1, limits.MAX_LAYERS, _GEMMA3_PATTERN)
        is_sliding = [(i + 1) % pattern != 0 for i in range(count)]
    return tuple(sliding if slides else full for slides in is_sliding)


def _rope(settings: Settings) -> RopeConfig:
    theta = settings.number("rope.freq_base", 1.0, 1e12, 10000.0)
    kind = settings.text("rope.scaling.type", "none")
    factor = settings.number("rope.scaling.factor", 1e-3, 1e6, 1.0)
    if settings.has("rope.scale_linear"):  # the form before 2023-09
        kind, factor = "linear", settings.number("rope.scale_linear", 1e-3, 1e6)
    if kind == "none":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, factor=factor)
    raise settings.unsupported(f"rope scaling {clip(kind)}")
