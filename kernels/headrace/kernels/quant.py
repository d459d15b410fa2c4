"""The one internal form of a quantised weight, whatever file it came from.

Loaders (`headrace.models`) produce `QuantTensor`; executors consume it. GGUF's block types, GPTQ and AWQ all map onto
the two affine kinds here without rounding: `weight = scale * q + zero`, with one scale (and zero) per row and group.
GGUF's K types store these scales and zeros as small integers times a float16; `TwoLevel` keeps that form beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

QuantKind = Literal["int4", "int8"]


SUPER = 256  # features that share a float16 scale in GGUF's K types


@dataclass(frozen=True, eq=False)
class TwoLevel:
    """Scales and zeros of a QuantTensor as integers and what these are multiplied by, exactly:
    scales = d * sub_scales and zeros = -(dmin * sub_mins), d and dmin one per row and SUPER features.

    d, dmin: float16 [rows, cols / SUPER]. sub_scales: uint8 in 0..63 beside mins, else int8, [rows, cols / group_size].
    sub_mins: uint8 in 0..63, of the same shape. dmin and sub_mins are None where the tensor has no zeros.
    """

    d: npt.NDArray[np.float16]
    dmin: npt.NDArray[np.float16] | None
    sub_scales: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    sub_mins: npt.NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """A matrix of `rows` x `cols` weights in groups of `group_size` along a row.

    packed: int4: uint8 [rows, cols / 2], element 2i in the low nibble of byte i, q in 0..15;
            int8: int8 [rows, cols], q in -128..127.
    scales: float32 [rows, cols / group_size].
    zeros:  float32 of the same shape, added after scaling, or None for symmetric weights.
    two_level: the same scales and zeros as they were stored, for Q4_K (int4, groups of 32), Q5_K (int8 in 0..31, groups
            of 32) and Q6_K (int8 in -32..31, groups of 16, no zeros); else None.
    """

    kind: QuantKind
    packed: npt.NDArray[np.uint8] | npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    zeros: npt.NDArray[np.float32] | None
    group_size: int
    two_level: TwoLevel | None = None

    def __post_init__(self) -> None:
        rows, cols = self.shape
        groups = (rows, cols // self.group_size)
        assert cols % self.group_size == 0, (cols, self.group_size)
        assert self.scales.shape == groups, (self.scales.shape, groups)
        assert self.zeros is None or self.zeros.shape == groups
        if self.two_level is not None:
            two = self.two_level
            assert cols % SUPER == 0, cols
            assert two.d.shape == (rows, cols // SUPER), two.d.shape
            assert two.sub_scales.shape == groups, two.sub_scales.shape
            assert (two.dmin is None) == (two.sub_mins is None) == (self.zeros is None)

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.packed.shape
        return rows, width * 2 if self.kind == "int4" else width

    def unpack(self) -> npt.NDArray[np.int8]:
        """The integers q, int8 [rows, cols]."""
        if self.kind == "int8":
            return self.packed.view(np.int8)
        rows, cols = self.shape
        q = np.empty((rows, cols), np.int8)
        q[:, 0::2] = self.packed & 0xF
        q[:, 1::2] = self.packed >> 4
        return q

    def dequantize(self) -> npt.NDArray[np.float32]:
        """The weights, float32 [rows, cols]: scale * q, then + zero, each rounded to float32 (as GGML does)."""
        rows, cols = self.shape
        q = self.unpack().astype(np.float32).reshape(rows, -1, self.group_size)
        q *= self.scales[:, :, None]
        if self.zeros is not None:
            q += self.zeros[:, :, None]
        return q.reshape(rows, cols)


def pack_int4(q: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Pack integers 0..15, uint8 [rows, cols] with even cols, two to a byte: the inverse of `QuantTensor.unpack`."""
    packed: npt.NDArray[np.uint8] = q[:, 0::2] | (q[:, 1::2] << np.uint8(4))
    return packed


Array = npt.NDArray[np.generic]
Weight = Array | QuantTensor
