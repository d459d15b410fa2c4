"""Ops: element-wise non-linearities. `reference.py` defines their meaning; `triton.py` is the GPU's."""

from headrace.kernels.activation.reference import gated_activation, soft_cap

__all__ = ["gated_activation", "soft_cap"]
