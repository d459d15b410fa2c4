"""Op: root mean square norm over rows or heads. `reference.py` defines its meaning; `triton.py` is the GPU's."""

from headrace.kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
