"""The output of a product in 8 bits, a scale for each row and 128 columns, where those lie in one tile: neither a
launch nor a 16-bit copy between the gate's product and down's in fp8_block. Called by `triton_finish.py`.

A scale for a whole row cannot be had so: a row lies in 100 programs, and the last of them would quantise it alone.
`activation/triton_quantize.py` does it in a launch of its own.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from headrace.kernels.linear.triton_tile import GATE_ROWS, activate, add_bias
from headrace.kernels.triton_convert import convert, scale_for

# Bits of HEAD_FLAGS: heads is an OutScale; the type that values are rounded to first, float32 if none.
HAS_OUT_SCALE = tl.constexpr(32)
ROUNDS_TO_FLOAT16 = tl.constexpr(64)
ROUNDS_TO_BFLOAT16 = tl.constexpr(128)


class OutScale(NamedTuple):
    """Where the scales go: float32 [M, count]."""

    scales: Any
    stride: Any
    count: Any


@triton.jit
def finish_and_quantize(
    acc, out, bias, place_of, first_row, first_m, M, num_rows, out_features, stride_out,
    ACTIVATION: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Bias and activation of a tile as `triton_tile.finish_tile`, then in 8 bits. The tile has a multiple of 128
    columns of the output. Rounded to the compute dtype in between, as where two launches do it: their bits."""
    BLOCK_M: tl.constexpr = acc.shape[1]
    COLUMNS: tl.constexpr = acc.shape[0] if ACTIVATION is None else acc.shape[0] // 2
    GROUPS: tl.constexpr = COLUMNS // 128
    dtype: tl.constexpr = out.dtype.element_ty
    acc = add_bias(acc, bias, first_row, num_rows, out_features, ACTIVATION is not None)
    if ACTIVATION is None:
        first_column = first_row
    else:
        halves = tl.reshape(acc, (COLUMNS // GATE_ROWS, 2, GATE_ROWS, BLOCK_M))
        gate, up = tl.split(tl.permute(halves, (0, 2, 3, 1)))
        acc = tl.reshape(activate(gate, up, ACTIVATION), (COLUMNS, BLOCK_M))
        first_column = first_row // 2
    if ROUNDS_TO_FLOAT16 & FLAGS:
        acc = acc.to(tl.float16).to(tl.float32)
    elif ROUNDS_TO_BFLOAT16 & FLAGS:
        acc = acc.to(tl.bfloat16).to(tl.float32)
    column = first_column + tl.arange(0, COLUMNS)
    m = first_m + tl.arange(0, BLOCK_M)
    mask = (column < out_features)[:, None] & (m < M)[None, :]
    parts = tl.reshape(tl.where(mask, acc, 0.0), (GROUPS, 128, BLOCK_M))
    scale = scale_for(tl.max(tl.abs(parts), axis=1), dtype)
    poison = tl.sum(parts * 0.0, axis=1)  # NaN where a value is not finite
    group = first_column // 128 + tl.arange(0, GROUPS)
    m = m.to(tl.int64)
    place = place_of.scales + m[None, :] * place_of.stride + group[:, None]
    tl.store(place, scale + poison, mask=(group < place_of.count)[:, None] & (m < M)[None, :])
    value = tl.reshape(parts / scale[:, None, :], (COLUMNS, BLOCK_M))
    tl.store(out + m[None, :] * stride_out + column[:, None], convert(value, dtype), mask=mask)
