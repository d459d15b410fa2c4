"""Op: look up token embeddings. `reference.py` defines its meaning; `triton.py` is the GPU's."""

from headrace.kernels.embed.reference import embed

__all__ = ["embed"]
