"""Weights and activations in 8 bits for matrix units that multiply 8 bits: pure functions on torch tensors.

Called when a model is to be served in w8a8 or fp8 (its loader has float weights, or a checkpoint's own quantised ones).
Weights: w8a8, int8 with a scale per row; fp8, e4m3 with a scale per row (a tensor's one scale, repeated, where several
tensors are joined); fp8_block, e4m3 with a scale per 128 rows and 128 columns, as DeepSeek-V3 is published.
Activations: a scale per row, or for fp8_block per row and 128 columns. A scale is largest magnitude / largest number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from headrace.kernels.linear.pack import LinearKind, PackedLinear, make_rowwise

BLOCK = 128
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # symmetric int8; OCP FP8 E4M3


@dataclass(frozen=True, eq=False)
class Quantized:
    """values * scales, the scales spread over what they belong to."""

    values: torch.Tensor
    scales: torch.Tensor


def pack_as(
    kind: LinearKind, weights: Sequence[torch.Tensor], *, dtype: torch.dtype, is_gated: bool = False
) -> PackedLinear:
    """Float weights [., K] as "w8a8", "fp8" or "fp8_block". Raises ValueError for another kind."""
    if kind == "w8a8":
        return pack_w8a8(weights, dtype=dtype, is_gated=is_gated)
    if kind == "fp8":
        return pack_fp8(weights, dtype=dtype, is_gated=is_gated)
    if kind == "fp8_block":
        return pack_fp8_block(weights, dtype=dtype, is_gated=is_gated)
    raise ValueError(f"no weights are quantised to {kind}")


def pack_w8a8(weights: Sequence[torch.Tensor], *, dtype: torch.dtype, is_gated: bool = False) -> PackedLinear:
    """Float weights [., K], rows one after the other, in int8. dtype: of the product's output."""
    quantized = quantize_rows(torch.cat(list(weights)), torch.int8)
    return pack_quantized("w8a8", quantized, [w.shape[0] for w in weights], dtype=dtype, is_gated=is_gated)


def pack_fp8(weights: Sequence[torch.Tensor], *, dtype: torch.dtype, is_gated: bool = False) -> PackedLinear:
    """Float weights [., K] in e4m3, one scale per tensor. dtype: of the product's output, and of x where it is wide."""
    parts = []
    for weight in weights:
        scale = _scale(weight.abs().amax().float(), torch.float8_e4m3fn)
        parts.append(Quantized(_round(weight.float() / scale, torch.float8_e4m3fn), scale.expand(weight.shape[0])))
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    joined = Quantized(values, torch.cat([part.scales for part in parts]))
    return pack_quantized("fp8", joined, [w.shape[0] for w in weights], dtype=dtype, is_gated=is_gated)


def pack_fp8_block(weights: Sequence[torch.Tensor], *, dtype: torch.dtype, is_gated: bool = False) -> PackedLinear:
    """Float weights [., K] in e4m3, a scale per 128 x 128; all but the last have a multiple of 128 rows, so that no
    block spans two. is_gated: (gate, up), of as many rows each, any number: each has blocks of its own."""
    rows = [weight.shape[0] for weight in weights]
    if not is_gated and any(count % BLOCK for count in rows[:-1]):
        raise ValueError(f"matrices in blocks of {BLOCK} rows cannot be joined at {rows}")
    parts = [quantize_blocks(weight) for weight in (weights if is_gated else [torch.cat(list(weights))])]
    values = torch.cat([part.values.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    joined = Quantized(values, torch.cat([part.scales for part in parts]))
    return pack_quantized("fp8_block", joined, rows, dtype=dtype, is_gated=is_gated)


def pack_quantized(
    kind: LinearKind, weight: Quantized, rows: Sequence[int], *, dtype: torch.dtype, is_gated: bool = False
) -> PackedLinear:
    """A weight that is quantised already, as a checkpoint holds it: values [N, K], scales float32 [N] (fp8_block:
    [ceil(N / 128), ceil(K / 128)], of gate and up one above the other). rows: of each source. Raises ValueError where
    these do not go together."""
    n, k = weight.values.shape
    blocks = 2 * -(-n // 2 // BLOCK) if is_gated else -(-n // BLOCK)
    want = (blocks, -(-k // BLOCK)) if kind == "fp8_block" else (n,)
    if weight.scales.shape != want or sum(rows) != n:
        raise ValueError(f"{kind} of {n} x {k}: scales {list(weight.scales.shape)}, want {list(want)}; rows {rows}")
    return make_rowwise(kind, weight.values, weight.scales.float(), tuple(rows), dtype, is_gated)


def unpack_quantized(packed: PackedLinear) -> torch.Tensor:
    """The float32 [N, K] that a w8a8, fp8 or fp8_block matrix stands for, gate above up where it is gated."""
    values, scales = packed.tensors["weight"].float(), packed.tensors["scales"]
    if packed.kind == "fp8_block":
        values = packed.without_gate_padding(values)
        halves = 2 if packed.is_gated else 1
        spread = scales.repeat_interleave(BLOCK, 1)[:, : values.shape[1]]
        spread = spread.view(halves, -1, values.shape[1]).repeat_interleave(BLOCK, 1)
        return values * spread[:, : values.shape[0] // halves].reshape(values.shape)
    return packed.without_gate_padding(values * scales[:, None])


def quantize_rows(x: torch.Tensor, dtype: torch.dtype) -> Quantized:
    """[M, K] to int8 or e4m3, a scale float32 [M]. What x_scale of `triton.linear` is, in torch."""
    scales = _scale(x.abs().amax(1).float(), dtype)
    return Quantized(_round(x.float() / scales[:, None], dtype), scales)


def quantize_groups(x: torch.Tensor) -> Quantized:
    """[M, K] to e4m3, a scale float32 [M, ceil(K / 128)]: x of an fp8_block product."""
    m, k = x.shape
    padded = torch.nn.functional.pad(x.float(), (0, -k % BLOCK)).view(m, -1, BLOCK)
    scales = _scale(padded.abs().amax(2), torch.float8_e4m3fn)
    values = _round(padded / scales[:, :, None], torch.float8_e4m3fn).view(m, -1)[:, :k]
    return Quantized(values.contiguous(), scales)


def quantize_blocks(weight: torch.Tensor) -> Quantized:
    """[N, K] to e4m3, a scale float32 [ceil(N / 128), ceil(K / 128)]."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scales = _scale(blocks.abs().amax((1, 3)), torch.float8_e4m3fn)
    values = _round(blocks / scales[:, None, :, None], torch.float8_e4m3fn).view(padded.shape)[:n, :k]
    return Quantized(values.contiguous(), scales)


def _scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return largest.clamp(min=1e-12) / LARGEST[dtype]


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else x.clamp(-448, 448).to(dtype)
