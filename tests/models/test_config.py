"""Model settings of both kinds: what is read, what is refused by name, what is a broken file."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from headrace.models.config import ModelConfig
from headrace.models.errors import ModelFileError, UnsupportedModelError
from headrace.models.files import TensorInfo
from headrace.models.rope import Llama3Scaling, RopeConfig, inverse_frequencies

from tests.conftest import TinyModels

HF: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
GEMMA: dict[str, Any] = {
    **{key: value for key, value in HF.items() if key != "hidden_act"},
    "model_type": "gemma3_text",
    "architectures": ["Gemma3ForCausalLM"],
    "num_hidden_layers": 7,
    "head_dim": 16,
    "query_pre_attn_scalar": 64,
    "sliding_window": 20,
}
GGUF: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 64,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 48,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
}
GEMMA_GGUF: dict[str, Any] = {
    "gemma3.block_count": 7,
    "gemma3.attention.key_length": 16,
    "gemma3.attention.value_length": 16,
    "gemma3.attention.sliding_window": 20,
    "gemma3.rope.freq_base": 1e6,
    "gemma3.rope.scaling.type": "linear",
    "gemma3.rope.scaling.factor": 8.0,
}
TABLE = {"token_embd.weight": TensorInfo("token_embd.weight", (100, 32), "F32", 12800)}


def hf(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**HF, **changes})


def gemma(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**GEMMA, **changes})


def gguf(changes: dict[str, Any] | None = None, architecture: str = "llama") -> ModelConfig:
    values = {key.replace("llama.", f"{architecture}."): value for key, value in GGUF.items()}
    values["general.architecture"] = architecture
    values |= changes or {}
    return ModelConfig.from_gguf({key: value for key, value in values.items() if value is not None}, TABLE, "tiny.gguf")


def test_both_kinds_of_file_give_the_same_config(tiny_models: TinyModels) -> None:
    from headrace.models.load import load_front

    from tests.support.tiny_models import ARCHITECTURES

    for architecture in ARCHITECTURES:
        if architecture == "llama3":  # its scaling is a tensor in GGUF
            continue
        directory = load_front(tiny_models.directory(architecture)).config
        file = load_front(tiny_models.gguf(architecture)).config
        assert directory.rms_norm_eps == pytest.approx(file.rms_norm_eps, rel=1e-6)  # GGUF keeps it in float32
        assert {**vars(directory), "rms_norm_eps": 0} == {**vars(file), "rms_norm_eps": 0}


def test_plain_llama() -> None:
    config = hf()
    assert (config.head_dim, config.num_kv_heads, config.is_tied, config.embed_scale) == (8, 2, False, 1.0)
    assert config.attention_scale == pytest.approx(8**-0.5)
    assert [layer.window for layer in config.layers] == [0, 0]
    assert config.layers[0].rope == RopeConfig(10000.0)
    assert gguf().attention_scale == config.attention_scale


def test_rotary_settings_before_and_since_transformers_5() -> None:
    old = hf(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    new = hf(rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0})
    assert old == new
    assert old.layers[0].rope == RopeConfig(5e5, factor=4.0)
    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    llama3 = hf(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **numbers})
    assert llama3.layers[0].rope == RopeConfig(5e5, llama3=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    assert gemma(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling={"rope_type": "linear", "factor": 8}) == gemma(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    )


def test_inverse_frequencies() -> None:
    plain = inverse_frequencies(RopeConfig(10000.0), 8)
    assert plain == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert inverse_frequencies(RopeConfig(10000.0, factor=4.0), 8) == pytest.approx([f / 4 for f in plain])
    assert inverse_frequencies(RopeConfig(10000.0, divisors=(1.0, 2.0, 4.0, 8.0)), 8) == pytest.approx(
        [1.0, 0.05, 0.0025, 0.000125]
    )
    # Wavelengths 6.3, 62.8, 628 and 6283 against 64 = 256 / 4 (left alone below) and 256 = 256 / 1 (stretched above).
    scaled = inverse_frequencies(RopeConfig(10000.0, llama3=Llama3Scaling(8.0, 1.0, 4.0, 256)), 8)
    assert scaled == pytest.approx([1.0, 0.1, 0.01 / 8, 0.001 / 8])
    # In between: 628 in 256..1024 of a context of 1024, by Meta's formula.
    smooth = (1024 / (2 * math.pi / 0.01) - 1.0) / (4.0 - 1.0)
    between = inverse_frequencies(RopeConfig(10000.0, llama3=Llama3Scaling(8.0, 1.0, 4.0, 1024)), 8)[2]
    assert between == pytest.approx((1 - smooth) * 0.01 / 8 + smooth * 0.01)


def test_windows() -> None:
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert [layer.window for layer in hf(**mistral, sliding_window=24).layers] == [24, 24]
    assert [layer.window for layer in hf(**mistral, sliding_window=None).layers] == [0, 0]
    assert [layer.window for layer in hf(**mistral).layers] == [4096, 4096]
    qwen = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "sliding_window": 24}
    assert [layer.window for layer in hf(**qwen, use_sliding_window=False).layers] == [0, 0]
    assert [layer.window for layer in hf(**qwen, use_sliding_window=True, max_window_layers=1).layers] == [0, 24]
    kinds = ["full_attention", "sliding_attention"]
    assert [layer.window for layer in hf(**qwen, layer_types=kinds).layers] == [0, 24]
    assert [layer.window for layer in gemma().layers] == [20, 20, 20, 20, 20, 0, 20]
    assert [layer.window for layer in gemma(sliding_window_pattern=2).layers] == [20, 0, 20, 0, 20, 0, 20]
    assert [layer.window for layer in gguf({"llama.attention.sliding_window": 24}).layers] == [24, 24]


def test_gemma_3() -> None:
    config = gemma()
    assert config.attention_scale == 64**-0.5
    assert config.embed_scale == float(np.float32(math.sqrt(32)))
    assert (config.is_tied, config.qk_norm, config.sandwich_norms, config.activation) == (True, True, True, "gelu_tanh")
    assert config.layers[0].rope.theta == 10000.0
    assert config.layers[5].rope.theta == 1000000.0
    assert config.final_soft_cap == config.attention_soft_cap == 0.0
    assert gemma(final_logit_softcapping=30.0, attn_logit_softcapping=50.0).final_soft_cap == 30.0

    from_gguf = gguf(GEMMA_GGUF, "gemma3")
    assert [layer.window for layer in from_gguf.layers] == [20, 20, 20, 20, 20, 0, 20]
    assert from_gguf.layers[5].rope == RopeConfig(1e6, factor=8.0)  # the scaling is of full layers alone
    assert from_gguf.layers[0].rope == RopeConfig(1e4)
    pattern = {"gemma3.attention.sliding_window_pattern": np.array([True, False, False, True, True, False, True])}
    with_pattern = gguf({**GEMMA_GGUF, **pattern}, "gemma3")
    assert [layer.window for layer in with_pattern.layers] == [20, 0, 0, 20, 20, 0, 20]
    # The 27B alone scales queries by hidden_size / heads.
    assert from_gguf.attention_scale == 16**-0.5
    assert gguf({**GEMMA_GGUF, "gemma3.block_count": 62}, "gemma3").attention_scale == 8**-0.5


def test_gguf_counts_per_layer_may_be_lists_of_equals() -> None:
    same = gguf({"llama.attention.head_count_kv": np.array([2, 2], np.int32)})
    assert same == gguf()
    with pytest.raises(UnsupportedModelError, match=r"llama\.attention\.head_count_kv"):
        gguf({"llama.attention.head_count_kv": np.array([2, 4], np.int32)})


UNSUPPORTED_HF = {
    "model type": ({"model_type": "mixtral"}, "mixtral"),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "experts": ({"num_local_experts": 8}, "num_local_experts"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    "activation": ({"hidden_act": "relu2"}, "relu2"),
    "yarn": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    "dynamic": ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "dynamic"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "layer types": ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    "nested rope": ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope_parameters"),
}


@pytest.mark.parametrize("case", UNSUPPORTED_HF)
def test_unsupported_directories_are_refused_by_name(case: str) -> None:
    changes, name = UNSUPPORTED_HF[case]
    with pytest.raises(UnsupportedModelError, match=name):
        hf(**changes)


def test_unsupported_gemma_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="use_bidirectional_attention"):
        gemma(use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="'gemma3'"):
        gemma(model_type="gemma3")  # with a vision tower
    with pytest.raises(UnsupportedModelError, match="hidden_activation 'gelu'"):
        gemma(hidden_activation="gelu")
    with pytest.raises(UnsupportedModelError, match="rope_parameters"):
        gemma(rope_parameters={"rope_type": "default", "rope_theta": 1e6})


UNSUPPORTED_GGUF = {
    "architecture": ({"general.architecture": "mamba"}, "mamba"),
    "experts": ({"llama.expert_count": 8}, "mixture of experts"),
    "not causal": ({"llama.attention.causal": False}, "causal"),
    "value length": ({"llama.attention.key_length": 8, "llama.attention.value_length": 16}, "value_length"),
    "partial rotation": ({"llama.rope.dimension_count": 4}, "dimension_count"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "yarn"),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor"),
    "unknown key": ({"llama.logit_scale": 2.0}, "logit_scale"),
}


@pytest.mark.parametrize("case", UNSUPPORTED_GGUF)
def test_unsupported_gguf_files_are_refused_by_name(case: str) -> None:
    changes, name = UNSUPPORTED_GGUF[case]
    with pytest.raises(UnsupportedModelError, match=rf"tiny\.gguf: .*{name}"):
        gguf(changes)


BROKEN_HF = {
    "missing": ({"hidden_size": None}, "hidden_size is missing"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "endless layers": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "negative heads": ({"num_attention_heads": -4}, "num_attention_heads"),
    "heads do not divide": ({"num_key_value_heads": 3}, "no multiple"),
    "odd head": ({"head_dim": 7}, "odd"),
    "head size unknown": ({"num_attention_heads": 6, "num_key_value_heads": 6}, "head_dim"),
    "a float count": ({"vocab_size": 100.0}, "vocab_size"),
    "a boolean count": ({"vocab_size": True}, "vocab_size"),
    "a list for a count": ({"vocab_size": [100, 100]}, "vocab_size"),
    "a string count": ({"hidden_size": "32"}, "hidden_size"),
    "endless vocabulary": ({"vocab_size": 10**400}, "vocab_size"),
    "eps": ({"rms_norm_eps": 0}, "rms_norm_eps"),
    "eps not finite": ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
    "theta": ({"rope_theta": -1.0}, "rope_theta"),
    "theta endless": ({"rope_theta": math.inf}, "rope_theta"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    "zero factor": ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor"),
    "rope scaling a list": ({"rope_scaling": [1]}, "rope_scaling"),
    "too few layer types": ({"layer_types": ["full_attention"]}, "layer_types"),
    "layer types of numbers": ({"layer_types": [1, 2]}, "layer_types"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    "type": ({"model_type": 7}, "model_type"),
    "context": ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
}


@pytest.mark.parametrize("case", BROKEN_HF)
def test_broken_directories_name_the_setting(case: str) -> None:
    changes, name = BROKEN_HF[case]
    with pytest.raises(ModelFileError, match=rf"config\.json: .*{name}"):
        hf(**changes)


BROKEN_GGUF = {
    "missing": ({"llama.embedding_length": None}, "embedding_length is missing"),
    "no architecture": ({"general.architecture": None}, "general.architecture is missing"),
    "heads do not divide": ({"llama.attention.head_count_kv": 3}, "no multiple"),
    "vocabulary": ({"llama.vocab_size": 99}, "vocab_size 99"),
    "empty list": ({"llama.attention.head_count": np.array([], np.int32)}, "head_count"),
    "list of floats": ({"llama.attention.head_count": np.array([4.0])}, "head_count"),
    "eps": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "epsilon"),
    "base": ({"llama.rope.freq_base": 0.0}, "freq_base"),
}


@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_broken_gguf_files_name_the_key(case: str) -> None:
    changes, name = BROKEN_GGUF[case]
    with pytest.raises(ModelFileError, match=rf"tiny\.gguf: .*{name}"):
        gguf(changes)


def test_gguf_without_embeddings() -> None:
    with pytest.raises(ModelFileError, match=r"token_embd\.weight"):
        ModelConfig.from_gguf(GGUF, {}, "tiny.gguf")


def test_messages_do_not_repeat_what_a_hostile_file_says_at_length() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        hf(model_type="x\x1b[31m\n" * 1000)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()
    with pytest.raises(ModelFileError) as broken:
        hf(hidden_size=json.loads('"' + "y" * 100_000 + '"'))
    assert len(str(broken.value)) < 300
