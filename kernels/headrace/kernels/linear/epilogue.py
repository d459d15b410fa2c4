"""What products do with what they have computed, as arguments of `triton.linear`: the heads of q, k and v (rope_kv),
the norm that comes next (next_norm). Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from headrace.kernels.linear.layout import SQUARES_COLUMNS

QUANTIZED_CACHES = (torch.int8, torch.uint8, torch.float8_e4m3fn)


@dataclass(frozen=True, eq=False)
class RopeKvEpilogue:
    """As `headrace.kernels.rope.triton.rope_kv`, whose bits it need not have: here nothing is rounded in between.

    The product's columns are q (num_heads heads), k and v (num_kv_heads each) of head_dim, a power of two from 16 to
    256. q, normed and turned, goes to its columns of `out`; k, normed and turned, and v go to the slots of the caches,
    [blocks, num_kv_heads, block_size, head_dim], whose last block, the null block, is not written at all.
    positions, slot_mapping: int32 [M]. inv_freq: float32 [head_dim / 2], None: nothing is turned. q_norm, k_norm:
    [head_dim], both or neither. k_scale, v_scale: float32 [num_kv_heads], exactly for quantised caches.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    head_dim: int
    num_heads: int
    inv_freq: torch.Tensor | None = None
    attention_factor: float = 1.0
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    eps: float = 0.0
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.k_cache.shape[1]

    def check(self, m: int, rows: int) -> None:
        """Raises ValueError where this does not fit a product of m rows with a matrix of `rows` rows."""
        d, heads = self.head_dim, self.num_heads + 2 * self.num_kv_heads
        if d not in (16, 32, 64, 128, 256) or heads * d != rows:
            raise ValueError(f"linear: rope_kv of {heads} heads of {d} (a power of two) on a matrix of {rows} rows")
        for name, cache in (("k_cache", self.k_cache), ("v_cache", self.v_cache)):
            shape = (*self.k_cache.shape[:3], d)
            if cache.shape != shape or cache.stride(3) != 1 or cache.dtype != self.k_cache.dtype:
                raise ValueError(f"linear: {name} {list(cache.shape)} {cache.dtype}: want {list(shape)}, heads dense")
        for name, rows_of in (("positions", self.positions), ("slot_mapping", self.slot_mapping)):
            if rows_of.shape != (m,) or rows_of.dtype != torch.int32:
                raise ValueError(f"linear: {name} {list(rows_of.shape)} {rows_of.dtype}: want int32 [{m}]")
        if self.inv_freq is not None and (self.inv_freq.shape != (d // 2,) or self.inv_freq.dtype != torch.float32):
            raise ValueError(f"linear: inv_freq {list(self.inv_freq.shape)}: want float32 [{d // 2}]")
        if (self.q_norm is None) != (self.k_norm is None):
            raise ValueError("linear: q_norm and k_norm go together")
        for weight in (self.q_norm, self.k_norm):
            if weight is not None and weight.shape != (d,):
                raise ValueError(f"linear: norm of heads {list(weight.shape)}: want [{d}]")
        for scale in (self.k_scale, self.v_scale):
            if (scale is not None) != (self.k_cache.dtype in QUANTIZED_CACHES):
                raise ValueError(f"linear: k_scale and v_scale go with a quantised cache, this is {self.k_cache.dtype}")
            if scale is not None and (scale.shape != (self.num_kv_heads,) or scale.dtype != torch.float32):
                raise ValueError(f"linear: scale of a cache {list(scale.shape)}: want float32 [{self.num_kv_heads}]")


@dataclass(frozen=True, eq=False)
class NextNorm:
    """What a product prepares of the norm of its output, for the products that read it (their x and `squares`).

    weight: [N] in a float type. normed: [M, N], gets out * weight; weight is rounded to out's type first. squares:
    float32 [M, ceil(N / 32)], gets the sums of squares of out, as stored, over 32 columns each.
    """

    weight: torch.Tensor
    normed: torch.Tensor
    squares: torch.Tensor

    def check(self, out: torch.Tensor) -> None:
        """Raises ValueError where this does not fit the product's output."""
        m, n = out.shape
        if self.normed.shape != (m, n) or self.normed.dtype != out.dtype or self.normed.stride(1) != 1:
            raise ValueError(f"linear: normed {list(self.normed.shape)} {self.normed.dtype}: want it like out")
        if self.weight.shape != (n,) or self.weight.stride(0) != 1 or not self.weight.is_floating_point():
            raise ValueError(f"linear: weight of the next norm {list(self.weight.shape)}: want [{n}] of a float type")
        check_squares("squares of the next norm", self.squares, m, n)


def check_quantized_out(out: torch.Tensor, out_scale: torch.Tensor, m: int, columns: int) -> None:
    """Raises ValueError unless these are rows in 8 bits and their scales, one each or one for each 128 columns."""
    want = (m,) if out_scale.ndim == 1 else (m, -(-columns // 128))
    if out.shape != (m, columns) or out.stride(1) != 1 or out.dtype not in QUANTIZED_CACHES:
        raise ValueError(f"linear: out {list(out.shape)} {out.dtype}: want {[m, columns]} in 8 bits with out_scale")
    if out_scale.shape != want or out_scale.dtype != torch.float32 or out_scale.stride(-1) != 1:
        raise ValueError(f"linear: out_scale {list(out_scale.shape)} {out_scale.dtype}: want float32 {list(want)}")


def check_squares(name: str, squares: torch.Tensor, m: int, columns: int) -> None:
    """Raises ValueError unless these are float32 [m, a sum for each 32 columns], dense along a row."""
    want = (m, -(-columns // SQUARES_COLUMNS))
    if squares.shape != want or squares.dtype != torch.float32 or squares.stride(1) != 1:
        raise ValueError(f"linear: {name} {list(squares.shape)} {squares.dtype}: want float32 {list(want)}")
