"""Names of weights: from the program's (which are GGUF's) to those of Hugging Face files. Called by `checkpoint.py`."""

from __future__ import annotations

from headrace.models.config import ModelConfig

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma norms the outputs of attention and MLP as well, so the norm before the MLP has another name.
_SANDWICH = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def hf_names(config: ModelConfig) -> dict[str, str]:
    """For every weight of the config's program, its name in a Hugging Face checkpoint."""
    parts = {**_LAYER, **(_SANDWICH if config.sandwich_norms else {})}
    if not config.qk_norm:
        parts = {name: hf_name for name, hf_name in parts.items() if name not in ("attn_q_norm", "attn_k_norm")}
    names = {name: hf_name for name, hf_name in _GLOBAL.items() if not (config.is_tied and name == "output.weight")}
    for layer in range(len(config.layers)):
        for name, hf_name in parts.items():
            names[f"blk.{layer}.{name}.weight"] = f"model.layers.{layer}.{hf_name}.weight"
            if config.qkv_bias and name in ("attn_q", "attn_k", "attn_v"):
                names[f"blk.{layer}.{name}.bias"] = f"model.layers.{layer}.{hf_name}.bias"
    return names
