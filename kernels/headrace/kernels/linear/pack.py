"""Weights as the GPU's products read them: pure functions on torch tensors, each with its inverse.

Called by the GPU executor while it loads a model (on the device that the tensors should end up on, or before), and by
`quantize.py`. The places are those of `layout.py`; the arithmetic of every kind is:

- int4, int8: w = scale * q + zero per row and group. Scales and zeros are kept in float16 where that costs no more
  than its 11 bits (GGUF's, GPTQ's and AWQ's own are float16), else, and for a float32 product, in float32.
- dense: rows of the compute dtype. w8a8, fp8, fp8_block: see `quantize.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal, cast

import numpy as np
import torch
from headrace.kernels.linear.layout import (
    GATE_ROWS,
    PLANES,
    TILE,
    BlockLayout,
    block_layout,
    dense_block_k,
    num_splits,
)
from headrace.kernels.quant import QuantTensor, Weight, pack_int4

LinearKind = Literal["dense", "int4", "int8", "w8a8", "fp8", "fp8_block"]

# Scales of the GROUPS of a block lie side by side, so that a program takes them in one load of this type.
SCALE_WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """A matrix [N, K], or several with their rows one after the other, packed.

    shape: (N, K), the rows of all sources. rows: N of each source. is_gated: two halves of N rows, gate then up,
    interleaved by `GATE_ROWS`. group_size: columns per scale as given (int4, int8), else 0. dtype: of the product's
    input and output, and of dense weights. tensors, T = ceil(N / 64) tiles of 64 rows, B blocks of K:
    - int4, int8: "words" int16 [T, B, 64, block_k / planes]; "scales" and, unless each zero is -8 * scale (int4) or 0
      (int8), "zeros": float16 [T, B, 64, groups] seen as integers [T, B, 64], or float32 [T, B, groups, 64].
    - dense: "weight" [N, K] of dtype, each row 16-byte aligned.
    - w8a8: "weight" int8 [N, K], "scales" float32 [N]. fp8: the same with float8_e4m3fn.
    - fp8_block: "weight" float8_e4m3fn [N, K], "scales" float32 [ceil(N / 128), ceil(K / 128)].
    Rows are padded to whole groups of 8 within each half of a gated matrix; what pads counts nothing.
    """

    kind: LinearKind
    shape: tuple[int, int]
    rows: tuple[int, ...]
    group_size: int
    is_gated: bool
    dtype: torch.dtype
    tensors: Mapping[str, torch.Tensor]

    @property
    def out_features(self) -> int:
        """Columns of the product's output."""
        return self.shape[0] // 2 if self.is_gated else self.shape[0]

    @property
    def packed_rows(self) -> int:
        """Rows as they lie, padding of the gated halves included."""
        return 2 * _ceil(self.out_features, GATE_ROWS) if self.is_gated else self.shape[0]

    @property
    def blocks(self) -> BlockLayout:
        """Of K; for kinds whose operands go to the matrix unit as they are, one plane and no groups."""
        if self.kind in PLANES:
            return block_layout(self.kind, self.group_size)
        item = 1 if self.kind == "fp8_block" else self.tensors["weight"].element_size()
        return BlockLayout(dense_block_k(item, self.shape[1]), 1, 1)

    @property
    def num_splits(self) -> int:
        """Chunks of K (`layout.num_splits`)."""
        return num_splits(self.shape[0], self.shape[1], self.blocks.block_k)

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def without_gate_padding(self, rows: torch.Tensor) -> torch.Tensor:
        """[packed_rows, C] to [N, C], gate above up: the inverse of the interleaving of a gated matrix."""
        if not self.is_gated:
            return rows
        halves = rows.reshape(-1, 2, GATE_ROWS, rows.shape[1]).transpose(0, 1).reshape(2, -1, rows.shape[1])
        return halves[:, : self.out_features].reshape(-1, rows.shape[1])

    def to(self, device: str | torch.device) -> PackedLinear:
        """The same matrix with its tensors on `device`."""
        return replace(self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()})


def pack(
    weights: Sequence[Weight | torch.Tensor],
    *,
    dtype: torch.dtype,
    is_gated: bool = False,
    device: str | torch.device = "cpu",
) -> PackedLinear:
    """Join the rows of `weights`, all [., K], in one packed matrix; is_gated: (gate, up), of as many rows each.

    Matrices of different kinds or group sizes become what holds both without rounding q: int8 with the smaller group;
    any dense one among them, or a group size that no kernel takes, makes the result dense. Raises ValueError on shapes.
    """
    shapes = [tuple(weight.shape) for weight in weights]
    if not weights or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
        raise ValueError(f"matrices to pack together must be [rows, cols] with the same cols, are {shapes}")
    if is_gated and (len(shapes) != 2 or shapes[0] != shapes[1]):
        raise ValueError(f"a gated matrix is made of gate and up of one shape, not of {shapes}")
    rows = tuple(shape[0] for shape in shapes)
    quants = [weight for weight in weights if isinstance(weight, QuantTensor)]
    if len(quants) == len(weights) and all(_has_kernel(quant) for quant in quants):
        return _pack_quants(quants, rows, dtype, is_gated, torch.device(device))
    joined = torch.cat([dense(weight).to(device, dtype) for weight in weights])
    return make_rowwise("dense", joined, None, rows, dtype, is_gated)


def unpack(packed: PackedLinear) -> list[QuantTensor] | list[torch.Tensor]:
    """The inverse of `pack`, for int4, int8 and dense: one matrix per source, in the kind it was packed as.

    Exact but for what packing rounds: dense weights to dtype, scales and zeros to float16 (nothing for files whose own
    are float16). A zero that int4 packs without (-8 * scale) comes back as a zero.
    """
    if packed.kind not in PLANES:
        weight = packed.without_gate_padding(packed.tensors["weight"][:, : packed.shape[1]])
        return [weight[end - count : end] for count, end in zip(packed.rows, accumulate(packed.rows), strict=True)]
    layout = packed.blocks
    q = packed.without_gate_padding(_read_words(packed.tensors["words"], packed, layout))
    scales = packed.without_gate_padding(_read_groups(packed.tensors["scales"], packed, layout))
    zeros: torch.Tensor | None
    if "zeros" in packed.tensors:
        zeros = packed.without_gate_padding(_read_groups(packed.tensors["zeros"], packed, layout))
    else:
        zeros = scales * -8.0 if packed.kind == "int4" else None
    stored = min(packed.group_size, layout.block_k)
    repeated = packed.group_size // stored
    parts, first = [], 0
    for count in packed.rows:
        one = slice(first, first + count)
        values = q[one].cpu().numpy()
        parts.append(
            QuantTensor(
                kind=cast(Literal["int4", "int8"], packed.kind),
                packed=pack_int4(values.astype(np.uint8)) if packed.kind == "int4" else values.astype(np.int8),
                scales=scales[one, ::repeated].cpu().numpy(),
                zeros=None if zeros is None else zeros[one, ::repeated].cpu().numpy(),
                group_size=packed.group_size,
            )
        )
        first += count
    return parts


def dense(weight: Weight | torch.Tensor) -> torch.Tensor:
    """A weight as a float tensor on the host, float32 unless it is a tensor already."""
    if isinstance(weight, torch.Tensor):
        return weight
    values = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return torch.from_numpy(np.array(values, np.float32))


def make_rowwise(
    kind: LinearKind,
    weight: torch.Tensor,
    scales: torch.Tensor | None,
    rows: tuple[int, ...],
    dtype: torch.dtype,
    is_gated: bool,
) -> PackedLinear:
    """A matrix whose rows stay rows: [N, K] with gate and up interleaved and each row 16-byte aligned."""
    shape, stored = (weight.shape[0], weight.shape[1]), weight.dtype
    if stored.itemsize == 1:  # torch copies few things in fp8
        weight = weight.view(torch.uint8)
    if is_gated:
        weight = _interleave(weight, 0)
        if scales is not None and kind != "fp8_block":  # whose blocks of gate precede those of up
            scales = _interleave(scales[:, None], 0)[:, 0]
    per_line = 16 // weight.element_size()
    stride = _ceil(shape[1], per_line)
    if weight.stride() != (stride, 1):
        padded = weight.new_zeros((weight.shape[0], stride))
        padded[:, : shape[1]] = weight
        weight = padded[:, : shape[1]]
    weight = weight.view(stored)
    tensors = {"weight": weight} if scales is None else {"weight": weight, "scales": scales.contiguous()}
    return PackedLinear(kind, shape, rows, 0, is_gated, dtype, tensors)


def _pack_quants(
    quants: Sequence[QuantTensor],
    rows: tuple[int, ...],
    dtype: torch.dtype,
    is_gated: bool,
    device: torch.device,
) -> PackedLinear:
    kind: LinearKind = "int4" if all(quant.kind == "int4" for quant in quants) else "int8"
    group_size = math.gcd(*(quant.group_size for quant in quants))
    layout = block_layout(kind, group_size)
    stored = min(group_size, layout.block_k)
    q = torch.cat([torch.from_numpy(quant.unpack()).to(device) for quant in quants])
    scales = torch.cat([_groups(quant.scales, quant.group_size // stored, device) for quant in quants])
    centre = -8.0 if kind == "int4" else 0.0
    zeros = torch.cat(
        [
            torch.zeros(quant.scales.shape, device=device).repeat_interleave(quant.group_size // stored, 1)
            if quant.zeros is None
            else _groups(quant.zeros, quant.group_size // stored, device)
            for quant in quants
        ]
    )
    needs_zeros = bool((zeros != scales * centre).any())
    if is_gated:
        q, scales, zeros = _interleave(q, 8 if kind == "int4" else 0), _interleave(scales, 0), _interleave(zeros, 0)
    in_half = dtype != torch.float32 and _fits_half(scales, scales) and _fits_half(zeros, scales)
    tensors = {"words": _write_words(q, kind, layout), "scales": _write_groups(scales, layout, in_half)}
    if needs_zeros:
        tensors["zeros"] = _write_groups(zeros, layout, in_half)
    shape = (sum(rows), q.shape[1])
    return PackedLinear(kind, shape, rows, group_size, is_gated, dtype, tensors)


def _has_kernel(quant: QuantTensor) -> bool:
    try:
        block_layout(quant.kind, quant.group_size)
    except ValueError:
        return False
    return True


def _groups(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], repeat: int, device: torch.device
) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.float32)).to(device).repeat_interleave(repeat, 1)


def _fits_half(values: torch.Tensor, scales: torch.Tensor) -> bool:
    """Whether float16 keeps values to half of its last bit, or to as little of the scale."""
    error = (values.to(torch.float16).float() - values).abs()
    return bool((error <= 2.0**-11 * torch.maximum(values.abs(), scales.abs())).all())


def _interleave(rows: torch.Tensor, padding: float) -> torch.Tensor:
    """[2 * n, C], gate then up, to [2 * ceil8(n), C]: 8 rows of gate, the same 8 of up, and so on."""
    n, cols = rows.shape[0] // 2, rows.shape[1]
    halves = rows.new_full((2, _ceil(n, GATE_ROWS), cols), padding)
    halves[:, :n] = rows.view(2, n, cols)
    return halves.view(2, -1, GATE_ROWS, cols).transpose(0, 1).reshape(-1, cols)


def _write_words(q: torch.Tensor, kind: str, layout: BlockLayout) -> torch.Tensor:
    """int8 [N, K] to int16 [T, B, 64, words]. int8 weights are stored with 128 added: unsigned."""
    n, k = q.shape
    offset, centre = (0, 8) if kind == "int4" else (128, 0)
    padded = torch.full((_ceil(n, TILE), _ceil(k, layout.block_k)), centre + offset, dtype=torch.int16, device=q.device)
    padded[:n, :k] = q.to(torch.int16) + offset
    planes = padded.view(padded.shape[0], -1, layout.planes, layout.words)
    shifts = torch.arange(layout.planes, device=q.device, dtype=torch.int16) * (16 // layout.planes)
    words = (planes << shifts[:, None]).sum(2, dtype=torch.int16)
    return words.view(-1, TILE, words.shape[1], layout.words).transpose(1, 2).contiguous()


def _read_words(words: torch.Tensor, packed: PackedLinear, layout: BlockLayout) -> torch.Tensor:
    bits = 16 // layout.planes
    shifts = torch.arange(layout.planes, device=words.device, dtype=torch.int32) * bits
    rows = words.transpose(1, 2).reshape(-1, words.shape[1], 1, layout.words).int()
    q = (rows >> shifts[:, None]) & ((1 << bits) - 1)
    q = q.reshape(q.shape[0], -1)[: packed.packed_rows, : packed.shape[1]]
    return (q - (0 if packed.kind == "int4" else 128)).to(torch.int8)


def _write_groups(values: torch.Tensor, layout: BlockLayout, in_half: bool) -> torch.Tensor:
    """float32 [N, G] to float16 [T, B, 64, groups] seen as integers, or to float32 [T, B, groups, 64]."""
    n, count = values.shape
    padded = values.new_zeros((_ceil(n, TILE), _ceil(count, layout.groups)))
    padded[:n, :count] = values
    tiles = padded.view(-1, TILE, padded.shape[1] // layout.groups, layout.groups)
    if in_half:
        half = tiles.permute(0, 2, 1, 3).to(torch.float16).contiguous()
        return half.view(SCALE_WORDS[layout.groups]).squeeze(-1)
    return tiles.permute(0, 2, 3, 1).contiguous()


def _read_groups(values: torch.Tensor, packed: PackedLinear, layout: BlockLayout) -> torch.Tensor:
    stored = min(packed.group_size, layout.block_k)
    if values.dtype != torch.float32:
        half = values.unsqueeze(-1).view(torch.float16)
        tiles = half.permute(0, 2, 1, 3).float()
    else:
        tiles = values.permute(0, 3, 1, 2)
    rows = tiles.reshape(tiles.shape[0] * TILE, -1)
    return rows[: packed.packed_rows, : packed.shape[1] // stored]


def _ceil(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
