"""config.json of a Hugging Face directory to `ModelConfig`. Called through `ModelConfig.from_hf`.

Reads both forms of the rotary settings: rope_parameters (transformers 5) and rope_theta with rope_scaling (before).
Defaults are those of transformers' configuration classes. What would change the numbers and is not implemented is
refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from headrace.models import config as limits
from headrace.models.config import Architecture, LayerConfig, ModelConfig
from headrace.models.files import clip
from headrace.models.rope import Llama3Scaling, RopeConfig
from headrace.models.settings import REQUIRED, Required, Settings


@dataclass(frozen=True)
class _Family:
    architecture: Architecture
    class_name: str
    activation_key: str = "hidden_act"
    activation: Literal["silu", "gelu_tanh"] = "silu"
    head_dim: int = 0  # default; 0: hidden_size / heads
    is_tied: bool = False
    theta: float = 10000.0
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False


_FAMILIES: dict[str, _Family] = {
    "llama": _Family("llama", "LlamaForCausalLM"),
    "mistral": _Family("llama", "MistralForCausalLM"),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM", head_dim=128, qk_norm=True),
    "gemma3_text": _Family(
        "gemma3",
        "Gemma3ForCausalLM",
        activation_key="hidden_activation",
        activation="gelu_tanh",
        head_dim=256,
        is_tied=True,
        theta=1000000.0,
        qk_norm=True,
        sandwich_norms=True,
    ),
}
_DEFAULT_WINDOW = 4096  # of MistralConfig and Gemma3TextConfig, where the key is absent; null is none
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_config(values: Mapping[str, object], file_name: str) -> ModelConfig:
    settings = Settings(values, file_name)
    family = _family(settings)
    _refuse_unsupported(settings, family)
    hidden = settings.integer("hidden_size", 1, limits.MAX_HIDDEN)
    heads = settings.integer("num_attention_heads", 1, limits.MAX_HEADS)
    kv_heads = settings.integer("num_key_value_heads", 1, limits.MAX_HEADS, heads)
    if heads % kv_heads:
        raise settings.inconsistent(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    default: int | Required = family.head_dim or (hidden // heads if hidden % heads == 0 else REQUIRED)
    head_dim = settings.integer("head_dim", 2, limits.MAX_HEAD_DIM, default)
    if head_dim % 2:
        raise settings.inconsistent(f"head_dim {head_dim} is odd")
    is_gemma = family.architecture == "gemma3"
    query_scale = settings.number("query_pre_attn_scalar", 1e-3, 1e6, 256.0) if is_gemma else float(head_dim)
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=settings.integer("vocab_size", 1, limits.MAX_VOCAB),
        context_length=settings.integer("max_position_embeddings", 1, limits.MAX_CONTEXT),
        hidden_size=hidden,
        intermediate_size=settings.integer("intermediate_size", 1, limits.MAX_INTERMEDIATE),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        layers=_layers(settings, family),
        rms_norm_eps=settings.number("rms_norm_eps", 1e-12, 0.1, 1e-6),
        activation=family.activation,
        attention_scale=query_scale**-0.5,
        is_tied=settings.flag("tie_word_embeddings", family.is_tied),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sandwich_norms=family.sandwich_norms,
        embed_scale=float(np.float32(math.sqrt(hidden))) if is_gemma else 1.0,
        attention_soft_cap=settings.number("attn_logit_softcapping", 0.0, 1e6, 0.0) if is_gemma else 0.0,
        final_soft_cap=settings.number("final_logit_softcapping", 0.0, 1e6, 0.0) if is_gemma else 0.0,
    )


def _family(settings: Settings) -> _Family:
    model_type = settings.text("model_type")
    family = _FAMILIES.get(model_type)
    if family is None:
        raise settings.unsupported(f"architecture {clip(model_type)}")
    classes = settings.texts("architectures")
    if classes and classes != [family.class_name]:
        raise settings.unsupported(f"architecture {clip(', '.join(classes))}")
    return family


def _refuse_unsupported(settings: Settings, family: _Family) -> None:
    for key in ("attention_bias", "mlp_bias", "use_bidirectional_attention"):
        # Qwen2's biases are of q, k and v alone and not a setting; a bias of the output projection is in no family.
        if settings.flag(key, False):
            raise settings.unsupported(f"{key} true")
    for key in ("num_experts", "num_local_experts", "quantization_config"):
        if settings.has(key):
            raise settings.unsupported(key)
    if settings.number("partial_rotary_factor", 0.0, 1e6, 1.0) != 1.0:
        raise settings.unsupported("partial_rotary_factor other than 1")
    activation = settings.text(family.activation_key, "silu" if family.activation == "silu" else "gelu_pytorch_tanh")
    if _ACTIVATIONS.get(activation) != family.activation:
        raise settings.unsupported(f"{family.activation_key} {clip(activation)}")


def _layers(settings: Settings, family: _Family) -> tuple[LayerConfig, ...]:
    count = settings.integer("num_hidden_layers", 1, limits.MAX_LAYERS)
    kinds = _layer_kinds(settings, family, count)
    window = 0
    if "sliding_attention" in kinds:
        window = settings.integer("sliding_window", 1, limits.MAX_CONTEXT, _DEFAULT_WINDOW)
    full_rope, sliding_rope = _ropes(settings, family)
    full, sliding = LayerConfig(0, full_rope), LayerConfig(window, sliding_rope)
    return tuple(sliding if kind == "sliding_attention" else full for kind in kinds)


def _layer_kinds(settings: Settings, family: _Family, count: int) -> list[str]:
    full, sliding = "full_attention", "sliding_attention"
    kinds = settings.texts("layer_types")
    if kinds:
        for kind in kinds:
            if kind not in (full, sliding):
                raise settings.unsupported(f"layer type {clip(kind)}")
        if len(kinds) != count:
            raise settings.inconsistent(f"layer_types has {len(kinds)} entries for {count} layers")
        return kinds
    if family.architecture == "gemma3":
        pattern = settings.integer("sliding_window_pattern", 1, limits.MAX_LAYERS, 6)
        return [full if (i + 1) % pattern == 0 else sliding for i in range(count)]
    if family.class_name == "MistralForCausalLM":
        is_null = "sliding_window" in settings.names() and not settings.has("sliding_window")
        return [full if is_null else sliding] * count
    if settings.flag("use_sliding_window", False) and settings.has("sliding_window"):  # Qwen: the upper layers slide
        first = settings.integer("max_window_layers", 0, limits.MAX_LAYERS, 28)
        return [sliding if i >= first else full for i in range(count)]
    return [full] * count


def _ropes(settings: Settings, family: _Family) -> tuple[RopeConfig, RopeConfig]:
    """Rotary settings of full and of sliding layers."""
    parameters = settings.group("rope_parameters")
    if parameters is not None:
        full, sliding = parameters.group("full_attention"), parameters.group("sliding_attention")
        if (full is None) != (sliding is None) or (full is None) == (family.architecture == "gemma3"):
            raise settings.unsupported("this form of rope_parameters")
        if full is None or sliding is None:
            rope = _rope(parameters, parameters.number("rope_theta", 1.0, 1e12, family.theta))
            return rope, rope
        return (
            _rope(full, full.number("rope_theta", 1.0, 1e12, family.theta)),
            _rope(sliding, sliding.number("rope_theta", 1.0, 1e12, 10000.0)),
        )
    theta = settings.number("rope_theta", 1.0, 1e12, family.theta)
    scaling = settings.group("rope_scaling")
    rope = RopeConfig(theta) if scaling is None else _rope(scaling, theta)
    if family.architecture != "gemma3":
        return rope, rope
    return rope, RopeConfig(settings.number("rope_local_base_freq", 1.0, 1e12, 10000.0))


def _rope(scaling: Settings, theta: float) -> RopeConfig:
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if scaling.number("partial_rotary_factor", 0.0, 1e6, 1.0) != 1.0:
        raise scaling.unsupported("partial_rotary_factor other than 1")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, factor=scaling.number("factor", 1e-3, 1e6))
    if kind == "llama3":
        llama3 = Llama3Scaling(
            factor=scaling.number("factor", 1e-3, 1e6),
            low_freq_factor=scaling.number("low_freq_factor", 1e-6, 1e6),
            high_freq_factor=scaling.number("high_freq_factor", 1e-6, 1e6),
            original_context_length=scaling.integer("original_max_position_embeddings", 1, limits.MAX_CONTEXT),
        )
        if llama3.high_freq_factor <= llama3.low_freq_factor:
            raise scaling.inconsistent("rope scaling: high_freq_factor must exceed low_freq_factor")
        return RopeConfig(theta, llama3=llama3)
    raise scaling.unsupported(f"rope scaling {clip(kind)}")
