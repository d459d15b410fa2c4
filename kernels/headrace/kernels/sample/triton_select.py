# mypy: ignore-errors
"""Kernels for rows with penalties or filters, and for the most likely tokens: one program per row.

Every filter keeps a prefix of the ranks (by logit, equal logits by id), so it is a threshold and the number of tokens
equal to it that stay. `find_prefix` finds it without a sort: each pass over the row counts, or weighs, what lies above
8 pivots, which narrows the range eightfold. Rows come out of the L2 cache from the second pass on, and chunks whose
highest logit is below the range are passed over: with 20 to 50 of 150,000 tokens left, most are.
"""

import triton
import triton.language as tl
from headrace.kernels.sample.triton_fields import (
    FIRST_ENTRY,
    HIGHEST,
    LAST_ENTRY,
    LOG_MIN_P,
    LOWEST,
    MODE,
    NUM_PLANES,
    NUM_TOP,
    PENDING,
    POSITION,
    SEED_HIGH,
    SEED_LOW,
    SELECT,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WINNER,
    as_bits,
    as_id,
    float_field,
    int_field,
    plane,
)
from headrace.kernels.sample.triton_noise import gumbel

PLANES = tl.constexpr(NUM_PLANES)
PIVOTS = tl.constexpr(8)
ALL = tl.constexpr(1 << 30)  # as a number of equal tokens that stay
LOWEST_KEY = tl.constexpr(-(1 << 31))


@triton.jit
def to_key(x):
    """An int32 that orders as the float32 does (no NaN; -0 must have been made 0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_key(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def load_logits(line, token, vocab_size):
    """-0 becomes 0, and what lies outside -inf."""
    return tl.load(line + token, mask=token < vocab_size, other=float("-inf")) + 0.0


@triton.jit
def pivots_between(low, high):
    """int32 [PIVOTS] keys from low on, below high, at equal distances of logits. The first is low itself, and the last
    is above it where there is room, so that every pass narrows the range."""
    index = tl.arange(0, PIVOTS)
    last = (high - 1).to(tl.int32)
    part = index.to(tl.float32) / PIVOTS
    pivot = to_key(from_key(low.to(tl.int32)) * (1.0 - part) + from_key(last) * part + 0.0)
    at_least = tl.where(index == PIVOTS - 1, tl.minimum(low + 1, high - 1), low).to(tl.int32)
    return tl.where(index == 0, low.to(tl.int32), tl.minimum(tl.maximum(pivot, at_least), last))


@triton.jit
def find_prefix(
    line,
    highs,
    slack,
    vocab_size,
    lowest,
    highest,
    inverse_temperature,
    wanted,
    edge,
    share,
    IS_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest key T for which the tokens with keys >= T weigh at least what is wanted, as (T, weight >= T,
    weight > T, the weight wanted).

    Not IS_MASS: a token weighs 1, wanted is a count. IS_MASS: exp((logit - highest) / temperature), times share where
    the key equals edge; wanted is a fraction of all that weighs from lowest on. Where too little weighs, T is lowest.
    No logit of a block is above the block's value in highs + slack.
    """
    low, high = to_key(lowest).to(tl.int64), to_key(highest).to(tl.int64) + 1
    at_low, at_high = -1.0, 0.0
    while (high - low > 1) | (at_low < 0.0):
        from_low = from_key(low.to(tl.int32))
        pivot = pivots_between(low, high)
        sums = tl.zeros((PIVOTS, BLOCK), tl.float32)
        first = tl.full((1, BLOCK), 0x7FFFFFFF, tl.int32)
        last = tl.full((1, BLOCK), LOWEST_KEY, tl.int32)
        for start in range(0, vocab_size, BLOCK):
            if tl.load(highs + start // BLOCK) + slack >= from_low:
                token = start + tl.arange(0, BLOCK)[None, :]
                x = load_logits(line, token, vocab_size)
                key = tl.where(token < vocab_size, to_key(x), LOWEST_KEY)
                weight = tl.full((1, BLOCK), 1.0, tl.float32)
                if IS_MASS:
                    weight = tl.exp((x - highest) * inverse_temperature)
                    weight = tl.where(key == edge, weight * share, weight)
                sums += tl.where(key >= pivot[:, None], weight, 0.0)
                is_between = (key >= low.to(tl.int32)) & (key <= (high - 1).to(tl.int32))
                first = tl.minimum(first, tl.where(is_between, key, 0x7FFFFFFF))
                last = tl.maximum(last, tl.where(is_between, key, LOWEST_KEY))
        above = tl.sum(sums, axis=1)
        if IS_MASS:
            if at_low < 0.0:
                wanted = wanted * tl.max(above, axis=0)
        is_enough = above >= wanted
        new_low = tl.max(tl.where(is_enough, pivot, low.to(tl.int32)), axis=0).to(tl.int64)
        high = tl.minimum(high, tl.min(tl.where(is_enough, high, pivot.to(tl.int64)), axis=0))
        at_low = tl.min(tl.where(is_enough, above, tl.max(above, axis=0)), axis=0)
        at_high = tl.maximum(at_high, tl.max(tl.where(is_enough, 0.0, above), axis=0))
        low = tl.maximum(new_low, tl.min(first).to(tl.int64))
        high = tl.minimum(high, tl.max(last).to(tl.int64) + 1)
    return low.to(tl.int32), at_low, at_high, wanted


@triton.jit
def count_equal(at_low, at_high, wanted, key, highest, inverse_temperature, IS_MASS: tl.constexpr):
    """How many of the tokens equal to the key stay, so that what is wanted is just reached; ALL where too little is."""
    if IS_MASS:
        each = tl.exp((from_key(key) - highest) * inverse_temperature)
        missing = tl.ceil((wanted - at_high) / tl.maximum(each, 1e-37))
    else:
        missing = wanted - at_high
    number = tl.minimum(tl.maximum(missing, 1.0), 1e9).to(tl.int32)
    return tl.where(at_low < wanted, ALL, number)


@triton.jit
def stays(key, threshold, num_equal, num_before, is_inside):
    """(Which tokens of a block stay, how many equal the threshold up to its end). num_before: of the blocks before."""
    is_equal = is_inside & (key == threshold)
    equal_here = tl.sum(is_equal.to(tl.int32), axis=0)
    keep = is_inside & (key >= threshold)
    if (equal_here > 0) & (num_before + equal_here > num_equal):
        rank = num_before + tl.cumsum(is_equal.to(tl.int32), axis=0)
        keep = keep & ((key > threshold) | (rank <= num_equal))
    return keep, num_before + equal_here


@triton.jit
def limits(
    line, row, workspace, is_adjusted, vocab_size, num_rows, num_chunks, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):
    """(lowest, highest, id of the highest) of a row's logits as they are now, -inf left out of the lowest."""
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    place = plane(workspace, HIGHEST, row, num_rows, num_chunks) + chunk
    highs = tl.load(place, mask=inside, other=float("-inf"))
    place = plane(workspace, LOWEST, row, num_rows, num_chunks) + chunk
    lowest = tl.min(tl.load(place, mask=inside, other=float("inf")), axis=0)
    winners = as_id(tl.load(plane(workspace, WINNER, row, num_rows, num_chunks) + chunk, mask=inside, other=0.0))
    highest = tl.max(highs, axis=0)
    best = tl.min(tl.where(inside & (highs == highest), winners, vocab_size), axis=0)
    if is_adjusted:
        high = tl.full((BLOCK,), float("-inf"), tl.float32)
        low = tl.full((BLOCK,), float("inf"), tl.float32)
        where_high = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab_size, BLOCK):
            token = start + tl.arange(0, BLOCK)
            x = load_logits(line, token, vocab_size)
            where_high = tl.where(x > high, token, where_high)
            high = tl.maximum(high, x)
            low = tl.minimum(low, tl.where(x > float("-inf"), x, float("inf")))
        highest, lowest = tl.max(high, axis=0), tl.min(low, axis=0)
        best = tl.min(tl.where(high == highest, where_high, vocab_size), axis=0)
    return lowest, highest, best


@triton.jit
def is_row_finite(workspace, row, num_rows, num_chunks, CHUNKS: tl.constexpr):
    chunk = tl.arange(0, CHUNKS)
    highest = tl.load(plane(workspace, HIGHEST, row, num_rows, num_chunks) + chunk, mask=chunk < num_chunks, other=0.0)
    return tl.max((highest != highest).to(tl.int32), axis=0) == 0


@triton.jit
def filters(line, highs, slack, rows, row, vocab_size, lowest, highest, inverse, BLOCK: tl.constexpr):
    """What top-k and then top-p leave: (lowest key that stays, how many equal to it do, lowest logit that stays)."""
    threshold, num_equal, share = LOWEST_KEY + 0, ALL + 0, 1.0
    top_k = int_field(rows, row, TOP_K)
    if (top_k > 0) & (top_k < vocab_size):
        count = top_k.to(tl.float32)
        threshold, at_low, at_high, wanted = find_prefix(
            line, highs, slack, vocab_size, lowest, highest, inverse, count, LOWEST_KEY, 1.0, False, BLOCK
        )
        num_equal = count_equal(at_low, at_high, wanted, threshold, highest, inverse, False)
        share = tl.where(at_low < wanted, 1.0, (wanted - at_high) / tl.maximum(at_low - at_high, 1.0))
        lowest = tl.maximum(lowest, from_key(threshold))
    top_p = float_field(rows, row, TOP_P)
    if top_p < 1.0:
        key, at_low, at_high, wanted = find_prefix(
            line, highs, slack, vocab_size, lowest, highest, inverse, top_p, threshold, share, True, BLOCK
        )
        equal = count_equal(at_low, at_high, wanted, key, highest, inverse, True)
        num_equal = tl.where(key == threshold, tl.minimum(num_equal, equal), equal)
        threshold = tl.maximum(threshold, key)
        lowest = tl.maximum(lowest, from_key(threshold))
    return threshold, num_equal, lowest


@triton.jit
def select_kernel(
    logits,
    rows,
    workspace,
    stride,
    vocab_size,
    num_rows,
    num_chunks,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row): the token of a row in mode "select"; nothing for the others."""
    row = tl.program_id(0)
    if int_field(rows, row, MODE) != SELECT:
        return
    if not is_row_finite(workspace, row, num_rows, num_chunks, CHUNKS):
        return
    line = logits + row.to(tl.int64) * stride
    temperature = float_field(rows, row, TEMPERATURE)
    has_entries = int_field(rows, row, LAST_ENTRY) > int_field(rows, row, FIRST_ENTRY)
    is_adjusted = has_entries | (int_field(rows, row, PENDING) >= 0)
    lowest, highest, winner = limits(line, row, workspace, is_adjusted, vocab_size, num_rows, num_chunks, CHUNKS, BLOCK)
    # The scan saw the logits before they were adjusted.
    slack = tl.where(is_adjusted, float("inf"), 0.0)
    highs = plane(workspace, HIGHEST, row, num_rows, num_chunks)
    if temperature > 0.0:
        inverse = 1.0 / temperature
        threshold, num_equal, lowest = filters(
            line, highs, slack, rows, row, vocab_size, lowest, highest, inverse, BLOCK
        )
        winner = draw(
            line, highs, slack, rows, row, vocab_size, lowest, highest, temperature, threshold, num_equal, winner, BLOCK
        )
    tl.store(workspace + PLANES * num_rows * num_chunks + row, as_bits(winner))


@triton.jit
def draw(
    line,
    highs,
    slack,
    rows,
    row,
    vocab_size,
    lowest,
    highest,
    temperature,
    threshold,
    num_equal,
    winner,
    BLOCK: tl.constexpr,
):
    """The winner of scaled logit + noise among the tokens that stay, none of which is below lowest."""
    log_min_p = float_field(rows, row, LOG_MIN_P)
    position = int_field(rows, row, POSITION).to(tl.uint32, bitcast=True)
    seed_low = int_field(rows, row, SEED_LOW).to(tl.uint32, bitcast=True)
    seed_high = int_field(rows, row, SEED_HIGH).to(tl.uint32, bitcast=True)
    best = float("-inf")
    num_before = 0
    for start in range(0, vocab_size, BLOCK):
        if tl.load(highs + start // BLOCK) + slack >= lowest:
            token = start + tl.arange(0, BLOCK)
            x = load_logits(line, token, vocab_size)
            keep, num_before = stays(to_key(x), threshold, num_equal, num_before, token < vocab_size)
            scaled = (x - highest) / temperature
            keep = keep & (scaled >= log_min_p)
            if tl.max(keep.to(tl.int32), axis=0) > 0:
                values = tl.where(keep, scaled + gumbel(start, position, seed_low, seed_high, BLOCK), float("-inf"))
                value = tl.max(values, axis=0)
                if value > best:
                    best = value
                    winner = tl.min(tl.where(values == value, token, vocab_size), axis=0)
    return winner


@triton.jit
def top_kernel(
    logits,
    rows,
    workspace,
    top_ids,
    top_logprobs,
    stride,
    vocab_size,
    num_rows,
    num_chunks,
    MAX_TOP: tl.constexpr,
    SLOTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row): the row's most likely tokens in rank order. Runs on unmodified logits, after `finish_kernel`."""
    row = tl.program_id(0)
    num_top = tl.minimum(int_field(rows, row, NUM_TOP), vocab_size)
    if num_top <= 0:
        return
    if not is_row_finite(workspace, row, num_rows, num_chunks, CHUNKS):
        return
    line = logits + row.to(tl.int64) * stride
    chunk = tl.arange(0, CHUNKS)
    inside = chunk < num_chunks
    highs = plane(workspace, HIGHEST, row, num_rows, num_chunks)
    highest = tl.max(tl.load(highs + chunk, mask=inside, other=float("-inf")), axis=0)
    place = plane(workspace, LOWEST, row, num_rows, num_chunks) + chunk
    lowest = tl.min(tl.load(place, mask=inside, other=float("inf")), axis=0)
    threshold, at_least, above, wanted = find_prefix(
        line, highs, 0.0, vocab_size, lowest, highest, 1.0, num_top.to(tl.float32), LOWEST_KEY, 1.0, False, BLOCK
    )
    num_equal = count_equal(at_least, above, wanted, threshold, highest, 1.0, False)
    slot = tl.arange(0, SLOTS)
    values = tl.full((SLOTS,), float("-inf"), tl.float32)
    ids = vocab_size + slot  # of empty slots: larger than any token's
    filled = 0
    num_before = 0
    for start in range(0, vocab_size, BLOCK):
        if tl.load(highs + start // BLOCK) >= from_key(threshold):
            token = start + tl.arange(0, BLOCK)
            x = load_logits(line, token, vocab_size)
            keep, num_before = stays(to_key(x), threshold, num_equal, num_before, token < vocab_size)
            for _ in range(tl.sum(keep.to(tl.int32), axis=0)):
                token_id = tl.min(tl.where(keep, token, vocab_size), axis=0)
                value = tl.max(tl.where(token == token_id, x, float("-inf")), axis=0)
                values = tl.where(slot == filled, value, values)
                ids = tl.where(slot == filled, token_id, ids)
                keep = keep & (token != token_id)
                filled += 1
    is_above = (values[None, :] > values[:, None]) | (
        (values[None, :] == values[:, None]) & (ids[None, :] < ids[:, None])
    )
    rank = tl.sum(is_above.to(tl.int32), axis=1)
    log_sum = tl.load(workspace + PLANES * num_rows * num_chunks + num_rows + row)
    # Empty slots, behind all others in rank, happen where the vocabulary is smaller than what is wanted.
    ids = tl.where(slot < filled, ids, -1)
    tl.store(top_ids + row * MAX_TOP + rank, ids, mask=rank < MAX_TOP)
    tl.store(top_logprobs + row * MAX_TOP + rank, tl.minimum(values - log_sum, 0.0), mask=rank < MAX_TOP)
