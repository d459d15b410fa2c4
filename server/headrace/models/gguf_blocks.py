"""GGML's tensor types: their layout on disk, and the exact way from each to float32 or to a `QuantTensor`.

Called by `gguf.py`. Layouts follow the block structs of ggml's `ggml-common.h`; the meaning of each is the one of
`ggml-quants.c` (`dequantize_row_*`). Nothing here rounds: a stored fp16 scale times a sub-scale of at most 6 bits is
exact in float32, and so `QuantTensor.dequantize()` gives ggml's value bit for bit. The one thing that differs is the
sign of a zero in Q4_0 and Q3_K: ggml computes scale * (q - 8), which is -0.0 at q = 8 under a negative scale, and
we compute scale * q - 8 * scale, which is +0.0. A sum never tells the two apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
from headrace.kernels.quant import SUPER, QuantKind, QuantTensor, TwoLevel, pack_int4

Blocks = npt.NDArray[np.void]  # structured, one element per block
U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

# Blocks unpacked at once: the temporaries stay in the second-level cache and small beside the tensor.
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Unpacked:
    """Some blocks in `QuantTensor`'s terms: packed [n, block], scales [n, groups], zeros likewise or None; of a block
    with scales of two levels also these integers, [n, groups]."""

    packed: U8 | npt.NDArray[np.int8]
    scales: F32
    zeros: F32 | None = None
    sub_scales: U8 | npt.NDArray[np.int8] | None = None
    sub_mins: U8 | None = None


@dataclass(frozen=True)
class BlockType:
    """One quantised type: `block_size` weights are stored in `layout.itemsize` bytes."""

    block_size: int
    layout: np.dtype[np.void]
    kind: QuantKind
    group_size: int
    unpack: Callable[[Blocks], Unpacked]


def _f32(values: npt.NDArray[Any]) -> F32:
    return values.astype(np.float32)


def _repack_nibbles(qs: U8) -> U8:
    """From ggml's order to `pack_int4`'s: uint8 [..., w] to [..., w].

    ggml keeps element j in the low nibble of byte j and element w + j in its high nibble; we keep neighbours together.
    """
    pairs = np.ascontiguousarray(qs).view("<u2")  # elements 2i and 2i + 1 of each half
    packed = np.empty((*qs.shape[:-1], 2, qs.shape[-1] // 2), np.uint8)
    packed[..., 0, :] = (pairs & 0x0F) | ((pairs >> 4) & 0xF0)
    packed[..., 1, :] = ((pairs >> 4) & 0x0F) | ((pairs >> 8) & 0xF0)
    return packed.reshape(qs.shape)


def _bits(data: U8, width: int) -> U8:
    """Split bytes [..., w] into their 8 / width fields of `width` bits: [..., 8 / width, w], lowest bits first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    fields: U8 = (data[..., None, :] >> shifts) & np.uint8((1 << width) - 1)
    return fields


def _scales_and_mins(packed: U8) -> tuple[U8, U8]:
    """The eight 6-bit scales and mins of a Q4_K or Q5_K block: uint8 [n, 12] to two of [n, 8].

    Bytes 0-3 hold scales 0-3, bytes 4-7 mins 0-3, bytes 8-11 the low nibbles of scales and mins 4-7, whose upper two
    bits sit on top of bytes 0-7 (`get_scale_min_k4`).
    """
    low, high, rest = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([low & 0x3F, (rest & 0x0F) | ((low >> 2) & 0x30)], axis=1)
    mins = np.concatenate([high & 0x3F, (rest >> 4) | ((high >> 2) & 0x30)], axis=1)
    return scales, mins


def _q4_0(b: Blocks) -> Unpacked:
    d = _f32(b["d"])[:, None]
    return Unpacked(_repack_nibbles(b["qs"]), d, d * np.float32(-8))


def _q4_1(b: Blocks) -> Unpacked:
    return Unpacked(_repack_nibbles(b["qs"]), _f32(b["d"])[:, None], _f32(b["m"])[:, None])


def _five_bits(b: Blocks) -> U8:
    """The 32 integers 0..31 of a Q5_0 or Q5_1 block."""
    low = _bits(b["qs"], 4).reshape(len(b), 32)
    high = np.unpackbits(b["qh"], axis=1, bitorder="little")
    q: U8 = low | (high << np.uint8(4))
    return q


def _q5_0(b: Blocks) -> Unpacked:
    return Unpacked(_five_bits(b).view(np.int8) - np.int8(16), _f32(b["d"])[:, None])


def _q5_1(b: Blocks) -> Unpacked:
    return Unpacked(_five_bits(b).view(np.int8), _f32(b["d"])[:, None], _f32(b["m"])[:, None])


def _q8_0(b: Blocks) -> Unpacked:
    return Unpacked(b["qs"], _f32(b["d"])[:, None])


def _q2_k(b: Blocks) -> Unpacked:
    q = _bits(b["qs"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    scales = _f32(b["d"])[:, None] * (b["scales"] & 0x0F)
    mins = _f32(b["dmin"])[:, None] * (b["scales"] >> 4)
    return Unpacked(pack_int4(q), scales, -mins)


def _q3_k(b: Blocks) -> Unpacked:
    low = _bits(b["qs"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    high = _bits(b["hmask"], 1).reshape(-1, 256)
    # Sixteen 6-bit scales, biased by 32: low nibbles in bytes 0-7, upper two bits in bytes 8-11.
    scale_low = _bits(b["scales"][:, 0:8], 4).reshape(-1, 16)
    scale_high = _bits(b["scales"][:, 8:12], 2).reshape(-1, 16)
    biased = (scale_low | (scale_high << np.uint8(4))).view(np.int8)
    scales = _f32(b["d"])[:, None] * (biased - np.int8(32))
    # ggml subtracts 4 where the high bit is clear; with 4 moved into the zero, the bit counts +4 where it is set.
    return Unpacked(pack_int4(low | (high << np.uint8(2))), scales, scales * np.float32(-4))


def _q4_k(b: Blocks) -> Unpacked:
    scales, mins = _scales_and_mins(b["scales"])
    packed = _repack_nibbles(b["qs"].reshape(-1, 4, 32)).reshape(-1, 128)
    return Unpacked(packed, _f32(b["d"])[:, None] * scales, -(_f32(b["dmin"])[:, None] * mins), scales, mins)


def _q5_k(b: Blocks) -> Unpacked:
    scales, mins = _scales_and_mins(b["scales"])
    low = _bits(b["qs"].reshape(-1, 4, 32), 4).reshape(-1, 256)
    high = _bits(b["qh"], 1).reshape(-1, 256)
    q = (low | (high << np.uint8(4))).view(np.int8)
    return Unpacked(q, _f32(b["d"])[:, None] * scales, -(_f32(b["dmin"])[:, None] * mins), scales, mins)


def _q6_k(b: Blocks) -> Unpacked:
    low = _bits(b["ql"].reshape(-1, 2, 64), 4).reshape(-1, 256)
    high = _bits(b["qh"].reshape(-1, 2, 32), 2).reshape(-1, 256)
    q = (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)
    return Unpacked(q, _f32(b["d"])[:, None] * b["scales"], sub_scales=b["scales"])


def _layout(*fields: tuple[str, str] | tuple[str, str, int]) -> np.dtype[np.void]:
    return np.dtype(list(fields))


_D, _M, _DMIN = ("d", "<f2"), ("m", "<f2"), ("dmin", "<f2")

BLOCK_TYPES: Mapping[str, BlockType] = MappingProxyType(
    {
        "Q4_0": BlockType(32, _layout(_D, ("qs", "u1", 16)), "int4", 32, _q4_0),
        "Q4_1": BlockType(32, _layout(_D, _M, ("qs", "u1", 16)), "int4", 32, _q4_1),
        "Q5_0": BlockType(32, _layout(_D, ("qh", "u1", 4), ("qs", "u1", 16)), "int8", 32, _q5_0),
        "Q5_1": BlockType(32, _layout(_D, _M, ("qh", "u1", 4), ("qs", "u1", 16)), "int8", 32, _q5_1),
        "Q8_0": BlockType(32, _layout(_D, ("qs", "i1", 32)), "int8", 32, _q8_0),
        "Q2_K": BlockType(256, _layout(("scales", "u1", 16), ("qs", "u1", 64), _D, _DMIN), "int4", 16, _q2_k),
        "Q3_K": BlockType(
            256, _layout(("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), _D), "int4", 16, _q3_k
        ),
        "Q4_K": BlockType(256, _layout(_D, _DMIN, ("scales", "u1", 12), ("qs", "u1", 128)), "int4", 32, _q4_k),
        "Q5_K": BlockType(
            256, _layout(_D, _DMIN, ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)), "int8", 32, _q5_k
        ),
        "Q6_K": BlockType(
            256, _layout(("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), _D), "int8", 16, _q6_k
        ),
    }
)

# Types that are stored plainly: bytes per weight.
DENSE_BYTES: Mapping[str, int] = MappingProxyType({"F32": 4, "F16": 2, "BF16": 2})

# `enum ggml_type`, in its order; it names the retired types too, so that a refusal can.
# fmt: off
_GGML_TYPES = (
    "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S",
    "IQ4_NL", "IQ3_S", "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M",
    "BF16", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8",
    "MXFP4", "NVFP4", "Q1_0",
)
# fmt: on
TYPE_NAMES: Mapping[int, str] = MappingProxyType(dict(enumerate(_GGML_TYPES)))


@dataclass(frozen=True)
class Storage:
    """How a type is stored: `block` weights in `nbytes` bytes."""

    block: int
    nbytes: int


def storage_of(type_name: str) -> Storage | None:
    """How a type is stored, or None where it is not supported."""
    if type_name in DENSE_BYTES:
        return Storage(1, DENSE_BYTES[type_name])
    block_type = BLOCK_TYPES.get(type_name)
    return None if block_type is None else Storage(block_type.block_size, block_type.layout.itemsize)


def decode_dense(raw: U8, type_name: str) -> F32:
    """The float32 values of F32, F16 or BF16 bytes, flat; for F32 a view of `raw`."""
    if type_name == "F32":
        return raw.view("<f4")
    if type_name == "F16":
        return raw.view("<f2").astype(np.float32)
    assert type_name == "BF16", type_name
    bits = raw.view("<u2").astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def decode_blocks(raw: U8, type_name: str, rows: int, cols: int) -> QuantTensor | None:
    """The quantised matrix [rows, cols] held by `raw`, or None if one of its scales is not finite.

    An infinite or NaN scale is no weight that a quantiser writes, and `scale * q + zero` would not equal ggml's value.
    """
    block_type = BLOCK_TYPES[type_name]
    blocks: Blocks = raw.view(block_type.layout)
    out = _empty(block_type, len(blocks))
    step = max(1, _CHUNK_BYTES // block_type.layout.itemsize)
    with np.errstate(invalid="ignore"):  # 0 * inf, answered below
        for start in range(0, len(blocks), step):
            part = block_type.unpack(blocks[start : start + step])
            for field in fields(Unpacked):
                to, values = getattr(out, field.name), getattr(part, field.name)
                if to is not None:
                    to[start : start + step] = values
    if not np.isfinite(out.scales).all() or not (out.zeros is None or np.isfinite(out.zeros).all()):
        return None
    groups = (rows, cols // block_type.group_size)
    zeros = None if out.zeros is None else out.zeros.reshape(groups)
    two_level = None
    if out.sub_scales is not None:
        supers = (rows, cols // SUPER)
        two_level = TwoLevel(
            np.ascontiguousarray(blocks["d"]).reshape(supers),
            None if out.sub_mins is None else np.ascontiguousarray(blocks["dmin"]).reshape(supers),
            out.sub_scales.reshape(groups),
            None if out.sub_mins is None else out.sub_mins.reshape(groups),
        )
    packed = out.packed.reshape(rows, -1)
    return QuantTensor(block_type.kind, packed, out.scales.reshape(groups), zeros, block_type.group_size, two_level)


def _empty(block_type: BlockType, count: int) -> Unpacked:
    """Room for `count` blocks: the arrays that unpacking one gives."""
    one = block_type.unpack(np.zeros(1, block_type.layout))
    room: dict[str, Any] = {}
    for field in fields(Unpacked):
        array = getattr(one, field.name)
        room[field.name] = None if array is None else np.empty((count, array.shape[1]), array.dtype)
    return Unpacked(**room)
