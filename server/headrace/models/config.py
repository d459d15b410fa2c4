"""What a decoder needs to know of a model, whatever file it came from.

Made by `config_hf.py` and `config_gguf.py`, read by `decoder.py`, `load.py` and the server (limits, information).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from headrace.models.rope import RopeConfig

if TYPE_CHECKING:
    from headrace.models.files import TensorInfo

Architecture = Literal["llama", "qwen2", "qwen3", "gemma3"]  # Mistral is Llama with a window

# Bounds of every count, far above any dense model known, so that a hostile file cannot ask for a giant program.
MAX_LAYERS = 1024
MAX_HIDDEN = 1 << 17
MAX_INTERMEDIATE = 1 << 20
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_VOCAB = 1 << 22
MAX_CONTEXT = 1 << 27


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer. window: positions that a query sees, itself included; 0: all."""

    window: int
    rope: RopeConfig


@dataclass(frozen=True)
class ModelConfig:
    """One dense decoder.

    qkv_bias: q, k and v have biases (Qwen2). qk_norm: RMS norm per head of q and k (Qwen3, Gemma 3). sandwich_norms:
    attention and MLP outputs are normed before they join the residual (Gemma 3). embed_scale multiplies embeddings.
    attention_scale multiplies scores. Soft caps: 0 is none. is_tied: the output head is the embedding table.
    """

    architecture: Architecture
    vocab_size: int
    context_length: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    rms_norm_eps: float
    activation: Literal["silu", "gelu_tanh"]
    attention_scale: float
    is_tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    embed_scale: float = 1.0
    attention_soft_cap: float = 0.0
    final_soft_cap: float = 0.0

    @classmethod
    def from_hf(cls, values: Mapping[str, object], file_name: str = "config.json") -> ModelConfig:
        """From a config.json. Raises ModelFileError and UnsupportedModelError."""
        from headrace.models.config_hf import read_config

        return read_config(values, file_name)

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, object], tensors: Mapping[str, TensorInfo], file_name: str = "GGUF file"
    ) -> ModelConfig:
        """From a GGUF header. Raises ModelFileError and UnsupportedModelError."""
        from headrace.models.config_gguf import read_config

        return read_config(metadata, tensors, file_name)
