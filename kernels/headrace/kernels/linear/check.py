"""What the GPU's product refuses before it launches anything. Called by `triton.py`; imports no triton."""

from __future__ import annotations

import torch
from headrace.kernels.linear.epilogue import check_quantized_out
from headrace.kernels.linear.pack import PackedLinear

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
QUANTIZED = {"w8a8": torch.int8, "fp8": torch.float8_e4m3fn, "fp8_block": torch.float8_e4m3fn}


def check_product(
    x: torch.Tensor,
    weight: PackedLinear,
    out: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    x_scale: torch.Tensor | None,
    activation: str | None,
    out_scale: torch.Tensor | None,
) -> None:
    """Raises ValueError where the arguments of `triton.linear` do not go together."""
    n, k = weight.shape
    quantized = QUANTIZED.get(weight.kind)
    if x.ndim != 2 or x.shape[1] != k or x.stride(1) != 1 or x.dtype not in (weight.dtype, quantized):
        raise ValueError(f"linear: x {_describe(x)}: want [M, {k}] {weight.dtype}, dense along a row")
    if (x.dtype == quantized) != (x_scale is not None) or (x_scale is not None and norm is not None):
        raise ValueError(f"linear: x_scale belongs to quantised x, x is {x.dtype}; norm to x of {weight.dtype}")
    if weight.kind == "w8a8" and x.dtype != torch.int8:
        raise ValueError(f"linear: the int8 weights of a w8a8 matrix take int8 x, not {x.dtype}")
    if x_scale is not None:
        want = (x.shape[0], -(-k // 128)) if weight.kind == "fp8_block" else (x.shape[0],)
        is_dense = x_scale.ndim == 2 or x_scale.stride(-1) == 1
        if x_scale.shape != want or x_scale.dtype != torch.float32 or not is_dense:
            raise ValueError(f"linear: x_scale {_describe(x_scale)}: want {list(want)} float32")
    if out_scale is not None:
        check_quantized_out(out, out_scale, x.shape[0], weight.out_features)
    for name, tensor in (("out", None if out_scale is not None else out), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.shape != (x.shape[0], weight.out_features) or tensor.stride(1) != 1 or tensor.dtype not in FLOATS:
            raise ValueError(
                f"linear: {name} {_describe(tensor)}: want [{x.shape[0]}, {weight.out_features}] of a float type"
            )
    for name, tensor, size in (("norm", None if norm is None else norm[0], k), ("bias", bias, n)):
        if tensor is not None and (tensor.shape != (size,) or tensor.stride(0) != 1 or tensor.dtype not in FLOATS):
            raise ValueError(f"linear: {name} {_describe(tensor)}: want [{size}] of a float type")
    if weight.is_gated != (activation is not None) or activation not in (None, "silu", "gelu_tanh"):
        raise ValueError(f"linear: activation {activation!r}, and the matrix has is_gated = {weight.is_gated}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} with strides {list(tensor.stride())}"
