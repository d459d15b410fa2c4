"""The one decoder: from a `ModelConfig` to the step program that every executor runs. Called by `load.py`.

Weights are named as in GGUF. The residual stream is the buffer `x`; `h` holds what a norm made of it.
"""

from __future__ import annotations

from headrace.kernels.program import (
    Add,
    Buffer,
    Embed,
    GatedActivation,
    KvLayout,
    KvWrite,
    Linear,
    Op,
    PagedAttention,
    RmsNorm,
    Rope,
    SelectRows,
    SoftCap,
    StepProgram,
    WeightSpec,
)
from headrace.models.config import ModelConfig
from headrace.models.rope import RopeConfig, inverse_frequencies


def build_program(config: ModelConfig) -> StepProgram:
    """Emit the forward pass of one step: embeddings, layers, the output head for the rows whose logits are wanted."""
    ops: list[Op] = [Embed("x", "token_embd.weight", config.embed_scale)]
    # One tuple per kind of layer, so that executors see by identity which layers turn alike.
    inv_freqs = {layer.rope: inverse_frequencies(layer.rope, config.head_dim) for layer in config.layers}
    for layer in range(len(config.layers)):
        ops += _attention(config, layer, inv_freqs)
        ops += _mlp(config, layer)
    head = "token_embd.weight" if config.is_tied else "output.weight"
    ops += [
        SelectRows("x_last", "x"),
        RmsNorm("h_last", "x_last", "output_norm.weight", config.rms_norm_eps, config.hidden_size),
        Linear("logits", "h_last", head),
    ]
    if config.final_soft_cap > 0.0:
        ops.append(SoftCap("logits", config.final_soft_cap))
    return StepProgram(
        buffers=_buffers(config),
        ops=tuple(ops),
        weights=_weights(config),
        kv=tuple(KvLayout(config.num_kv_heads, config.head_dim, layer.window) for layer in config.layers),
        vocab_size=config.vocab_size,
    )


def _attention(config: ModelConfig, layer: int, inv_freqs: dict[RopeConfig, tuple[float, ...]]) -> list[Op]:
    block, eps, head_dim = f"blk.{layer}.", config.rms_norm_eps, config.head_dim
    layer_config = config.layers[layer]
    inv_freq = inv_freqs[layer_config.rope]
    ops: list[Op] = [RmsNorm("h", "x", f"{block}attn_norm.weight", eps, config.hidden_size)]
    for name in ("q", "k", "v"):
        bias = f"{block}attn_{name}.bias" if config.qkv_bias else None
        ops.append(Linear(name, "h", f"{block}attn_{name}.weight", bias))
    if config.qk_norm:
        ops += [RmsNorm(name, name, f"{block}attn_{name}_norm.weight", eps, head_dim) for name in ("q", "k")]
    ops += [
        Rope("q", head_dim, inv_freq),
        Rope("k", head_dim, inv_freq),
        KvWrite(layer, "k", "v"),
        PagedAttention(
            "attn",
            "q",
            layer,
            config.num_heads,
            config.num_kv_heads,
            head_dim,
            scale=config.attention_scale,
            window=layer_config.window,
            soft_cap=config.attention_soft_cap,
        ),
        Linear("h", "attn", f"{block}attn_output.weight"),
    ]
    if config.sandwich_norms:
        ops.append(RmsNorm("h", "h", f"{block}post_attention_norm.weight", eps, config.hidden_size))
    ops.append(Add("x", "x", "h"))
    return ops


def _mlp(config: ModelConfig, layer: int) -> list[Op]:
    block, eps = f"blk.{layer}.", config.rms_norm_eps
    ops: list[Op] = [
        RmsNorm("h", "x", f"{block}ffn_norm.weight", eps, config.hidden_size),
        Linear("gate", "h", f"{block}ffn_gate.weight"),
        Linear("up", "h", f"{block}ffn_up.weight"),
        GatedActivation("act", "gate", "up", config.activation),
        Linear("h", "act", f"{block}ffn_down.weight"),
    ]
    if config.sandwich_norms:
        ops.append(RmsNorm("h", "h", f"{block}post_ffw_norm.weight", eps, config.hidden_size))
    ops.append(Add("x", "x", "h"))
    return ops


def _buffers(config: ModelConfig) -> tuple[Buffer, ...]:
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    tokens = {"x": config.hidden_size, "h": config.hidden_size, "q": query_width, "k": kv_width, "v": kv_width}
    tokens |= {"attn": query_width} | dict.fromkeys(("gate", "up", "act"), config.intermediate_size)
    logits = {"x_last": config.hidden_size, "h_last": config.hidden_size, "logits": config.vocab_size}
    return (
        *(Buffer(name, "tokens", width) for name, width in tokens.items()),
        *(Buffer(name, "logits", width) for name, width in logits.items()),
    )


def _weights(config: ModelConfig) -> tuple[WeightSpec, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (query_width, hidden),
        "attn_k.weight": (kv_width, hidden),
        "attn_v.weight": (kv_width, hidden),
        "attn_output.weight": (hidden, query_width),
        "ffn_norm.weight": (hidden,),
        "ffn_gate.weight": (inner, hidden),
        "ffn_up.weight": (inner, hidden),
        "ffn_down.weight": (hidden, inner),
    }
    if config.qkv_bias:
        layer |= {"attn_q.bias": (query_width,), "attn_k.bias": (kv_width,), "attn_v.bias": (kv_width,)}
    if config.qk_norm:
        layer |= {"attn_q_norm.weight": (config.head_dim,), "attn_k_norm.weight": (config.head_dim,)}
    if config.sandwich_norms:
        layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    specs = [WeightSpec("token_embd.weight", (config.vocab_size, hidden))]
    for index in range(len(config.layers)):
        specs += [WeightSpec(f"blk.{index}.{name}", shape) for name, shape in layer.items()]
    specs.append(WeightSpec("output_norm.weight", (hidden,)))
    if not config.is_tied:
        specs.append(WeightSpec("output.weight", (config.vocab_size, hidden)))
    return tuple(specs)
