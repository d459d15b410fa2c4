# mypy: ignore-errors
"""The first and last kernels of sampling: one pass over the logits in chunks, and what the chunks of a row make.

Rows that want neither penalties nor filters are done after these two.
"""

import triton
import triton.language as tl
from headrace.kernels.sample.triton_fields import (
    DRAW,
    HIGHEST,
    LOWEST,
    MODE,
    NUM_PLANES,
    POSITION,
    SCORE,
    SEED_HIGH,
    SEED_LOW,
    SELECT,
    SUM,
    TARGET,
    TEMPERATURE,
    VALUE,
    WANTS_LOGPROB,
    WINNER,
    as_bits,
    as_id,
    float_field,
    int_field,
    plane,
)
from headrace.kernels.sample.triton_noise import gumbel

PLANES = tl.constexpr(NUM_PLANES)


@triton.jit
def scan_kernel(logits, rows, workspace, stride, vocab_size, num_rows, num_chunks, CHUNK: tl.constexpr):
    """Program (row, chunk): the chunk's highest and lowest logit, sum of exponentials, and winner."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = token < vocab_size
    x = tl.load(logits + row.to(tl.int64) * stride + token, mask=inside, other=float("-inf"))
    is_bad = inside & ((x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) >= 0x7F800000)
    highest = tl.max(tl.where(is_bad, float("-inf"), x), axis=0)
    lowest = tl.min(tl.where(is_bad | (token >= vocab_size), float("inf"), x), axis=0)
    winner = tl.min(tl.where(inside & (x == highest), token, vocab_size), axis=0)
    value = 0.0
    mode = int_field(rows, row, MODE)
    if mode == DRAW:
        low, high = int_field(rows, row, SEED_LOW), int_field(rows, row, SEED_HIGH)
        noise = gumbel(
            chunk * CHUNK,
            int_field(rows, row, POSITION).to(tl.uint32, bitcast=True),
            low.to(tl.uint32, bitcast=True),
            high.to(tl.uint32, bitcast=True),
            CHUNK,
        )
        values = (x - highest) / float_field(rows, row, TEMPERATURE) + noise
        value = tl.max(tl.where(inside, values, float("-inf")), axis=0)
        winner = tl.min(tl.where(inside & (values == value), token, vocab_size), axis=0)
    total = 0.0
    if int_field(rows, row, WANTS_LOGPROB) != 0:
        total = tl.sum(tl.where(inside, tl.exp(x - highest), 0.0), axis=0)
    is_finite = tl.max(is_bad.to(tl.int32), axis=0) == 0
    tl.store(plane(workspace, HIGHEST, row, num_rows, num_chunks) + chunk, tl.where(is_finite, highest, float("nan")))
    tl.store(plane(workspace, LOWEST, row, num_rows, num_chunks) + chunk, lowest)
    tl.store(plane(workspace, SUM, row, num_rows, num_chunks) + chunk, total)
    tl.store(plane(workspace, VALUE, row, num_rows, num_chunks) + chunk, value)
    tl.store(plane(workspace, WINNER, row, num_rows, num_chunks) + chunk, as_bits(winner))


@triton.jit
def finish_kernel(
    logits,
    rows,
    workspace,
    token_ids,
    logprobs,
    finite,
    stride,
    vocab_size,
    num_rows,
    num_chunks,
    CHUNKS: tl.constexpr,
):
    """Program (row): the winner of the chunks' winners, and its log-probability where it is wanted."""
    row = tl.program_id(0)
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    highest = tl.load(plane(workspace, HIGHEST, row, num_rows, num_chunks) + chunk, mask=inside, other=float("-inf"))
    winner = as_id(tl.load(plane(workspace, WINNER, row, num_rows, num_chunks) + chunk, mask=inside, other=0.0))
    is_finite = tl.max((highest != highest).to(tl.int32), axis=0) == 0
    row_highest = tl.max(tl.where(is_finite, highest, 0.0), axis=0)
    mode = int_field(rows, row, MODE)
    values = highest
    if mode == DRAW:
        value = tl.load(plane(workspace, VALUE, row, num_rows, num_chunks) + chunk, mask=inside, other=0.0)
        values = (highest - row_highest) / float_field(rows, row, TEMPERATURE) + value
    best = tl.max(tl.where(inside & is_finite, values, float("-inf")), axis=0)
    token_id = tl.min(tl.where(inside & (values == best), winner, vocab_size), axis=0)
    per_row = workspace + PLANES * num_rows * num_chunks
    if mode == SELECT:
        token_id = as_id(tl.load(per_row + row))
    if mode == SCORE:
        token_id = int_field(rows, row, TARGET)
    token_id = tl.where(is_finite | (mode == SCORE), token_id, 0)
    logprob = float("nan")
    if (int_field(rows, row, WANTS_LOGPROB) != 0) & is_finite:
        total = tl.load(plane(workspace, SUM, row, num_rows, num_chunks) + chunk, mask=inside, other=0.0)
        log_sum = row_highest + tl.log(tl.sum(total * tl.exp(highest - row_highest), axis=0))
        tl.store(per_row + num_rows + row, log_sum)
        logit = tl.load(logits + row.to(tl.int64) * stride + token_id)
        logprob = tl.minimum(logit - log_sum, 0.0)
    tl.store(token_ids + row, token_id)
    tl.store(logprobs + row, logprob)
    tl.store(finite + row, is_finite.to(tl.int32))
