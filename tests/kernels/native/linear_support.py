"""What the tests of linear layers share: random quantised matrices, and what a product may differ by."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from headrace.kernels.native.library import info
from headrace.kernels.native.linear_ops import Quantized
from headrace.kernels.quant import QuantKind, QuantTensor, pack_int4

ISAS = info().usable
F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]


def random_tensor(
    kind: QuantKind,
    rows: int,
    cols: int,
    group: int,
    *,
    has_zeros: bool = True,
    is_f16: bool = True,
    magnitude: float = 1.0,
    seed: int = 0,
) -> QuantTensor:
    """Random weights. Without zeros int4 gets those of Q4_0, -8 * scale, which packing leaves out.

    is_f16: scales and zeros are float16's; else they need float32 (they reach from 1e-7 to 1, times magnitude).
    """
    rng = np.random.default_rng(seed)
    shape = (rows, cols // group)
    scales = rng.uniform(0.001, 0.02, shape) if is_f16 else 10 ** rng.uniform(-7, 0, shape)
    if not is_f16:
        scales[0, 0] = 1e-7
    scales = np.where(rng.random(shape) < 0.5, -scales, scales) * magnitude
    zeros = rng.standard_normal(shape) * np.abs(scales) * 8
    dtype = np.float16 if is_f16 else np.float32
    scales, zeros = scales.astype(dtype).astype(np.float32), zeros.astype(dtype).astype(np.float32)
    if kind == "int8":
        q = rng.integers(-128, 128, (rows, cols), dtype=np.int8)
        return QuantTensor("int8", q, scales, zeros if has_zeros else None, group)
    if not has_zeros:
        # Short enough that scale * (q - 8) is exact, or packing keeps the zeros.
        scales = (scales.view(np.uint32) & np.uint32(0xFFFFFFF0)).view(np.float32)
        zeros = scales * np.float32(-8)
    return QuantTensor("int4", pack_int4(rng.integers(0, 16, (rows, cols), dtype=np.uint8)), scales, zeros, group)


def weights_of(tensor: QuantTensor) -> F64:
    """The weights in float64, not rounded."""
    scales = np.repeat(tensor.scales.astype(np.float64), tensor.group_size, axis=1)
    weights: F64 = tensor.unpack() * scales
    if tensor.zeros is not None:
        weights = weights + np.repeat(tensor.zeros.astype(np.float64), tensor.group_size, axis=1)
    return weights


def rounding_bound(tensor: QuantTensor, x: Quantized) -> F64:
    """By how much a product of these may differ from the exact one, float64 [x.rows, rows].

    Each part of a block (16 or 32 features) is exact but for a rounded product with the weight's scale, a rounded
    sum of activations where there are zeros, and one or two fused multiply-adds. So n parts make at most 2 n + 2
    roundings of half a unit (2^-24) of a number no larger than the sum of all |scale * q * x| and |zero * x|. Below the
    normal numbers (2^-126) a rounding is 2^-150, of something that is then multiplied by the activation scale.
    """
    parts = tensor.shape[1] // min(tensor.group_size, 32)
    scales = np.repeat(np.abs(tensor.scales.astype(np.float64)), tensor.group_size, axis=1)
    sizes = np.maximum(np.abs(tensor.unpack().astype(np.float64)), 8) * scales  # int4 may be stored as q - 8
    if tensor.zeros is not None:
        sizes = sizes + np.repeat(np.abs(tensor.zeros.astype(np.float64)), tensor.group_size, axis=1)
    bound: F64 = (2 * parts + 2) * 2.0**-24 * (np.abs(x.dequantize()) @ sizes.T)
    tiny = 2.0**-149 * np.maximum(x.scales, 1).astype(np.float64).sum(axis=1)
    return bound + 2 * tiny[:, None]


def quantisation_bound(weights: F64, x: Quantized) -> F64:
    """By how much quantising the activations may change a product: half a step for each, float64 [x.rows, rows].

    A hundredth of a step more is for the rounding of the step itself; groups below 2^-110 become zero.
    """
    steps = np.repeat(x.scales.astype(np.float64), 32, axis=1) * 0.51 + 2.0**-110
    bound: F64 = steps @ np.abs(weights).T
    return bound
