"""From a model's rotary settings to the inverse frequencies that the step program holds. Called by `decoder.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the low frequencies (Meta's llama-models, `apply_scaling`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_length: int


@dataclass(frozen=True)
class RopeConfig:
    """Rotary settings of a layer.

    theta: the base. factor: all frequencies are divided by it ("linear" scaling). llama3: or they are scaled so.
    divisors: or by one number each, head_dim / 2 of them (the tensor rope_freqs.weight of a GGUF file).
    """

    theta: float
    factor: float = 1.0
    llama3: Llama3Scaling | None = None
    divisors: tuple[float, ...] | None = None


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[float, ...]:
    """theta^(-2i / head_dim) for i in 0..head_dim / 2 - 1 (Su et al. 2021), scaled; radians per position."""
    freqs = [rope.theta ** (-2.0 * i / head_dim) / rope.factor for i in range(head_dim // 2)]
    if rope.llama3 is not None:
        freqs = [_scale_llama3(freq, rope.llama3) for freq in freqs]
    if rope.divisors is not None:
        freqs = [freq / divisor for freq, divisor in zip(freqs, rope.divisors, strict=True)]
    return tuple(freqs)


def _scale_llama3(freq: float, scaling: Llama3Scaling) -> float:
    """Wavelengths above context / low_freq_factor are stretched by `factor`, those below context / high_freq_factor
    are left alone, and between the two the weight of the two forms moves linearly with the wavelength's inverse."""
    turns = scaling.original_context_length * freq / (2.0 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = min(max(kept, 0.0), 1.0)
    return freq * kept + freq / scaling.factor * (1.0 - kept)
