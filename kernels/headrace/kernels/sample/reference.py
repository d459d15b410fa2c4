"""Op: from logits to tokens and log-probabilities. Called by every executor at the end of a step; numpy alone.

The order is vLLM's: logit bias, penalties, banned tokens, temperature, then top-k, top-p of what top-k left, min-p.
A token is drawn by the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014): the highest logit / temperature + noise,
the noise from Philox by (seed, position, token id). Small changes of the logits therefore seldom change the token.
Ranks are by logit, equal logits by token id, lowest first, so every filter keeps a prefix of one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from headrace.kernels.batch import F32, RowResult, RowSampling
from headrace.kernels.philox import MAX_GUMBEL, gumbel

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]

# Logits within this of the best are drawn first; with the best of them most others are out of reach of the noise.
_HEAD = 8.0
# Histogram of `scaled` for top-p: 0 down to -32 (e^-32 is 1e-14 of the best), the last bin holds what is below.
_BINS_PER_UNIT = 32
_NUM_BINS = 1024
_LARGEST = np.finfo(np.float32).max


def sample(logits: F32, rows: Sequence[RowSampling]) -> list[RowResult]:
    """One result per row of logits, float32 [S, V], unchanged.

    A row with NaN or infinity is marked and not sampled. Log-probabilities are of the unmodified logits. Sums of
    exponentials are accumulated in float64 from float32 terms; noise and the final comparison are float64.
    """
    assert logits.shape[0] == len(rows), (logits.shape, len(rows))
    if not rows:
        return []
    highest = logits.max(axis=1)  # NaN where the row holds one
    is_finite = np.isfinite(highest) & np.isfinite(logits.min(axis=1))
    # Tiny temperatures and penalties overflow to infinity, which compares as it should.
    with np.errstate(over="ignore"):
        return [
            _sample_row(logits[i], float(highest[i]), row)
            if is_finite[i]
            else RowResult(max(row.target, 0), math.nan, (), False)
            for i, row in enumerate(rows)
        ]


def _sample_row(logits: F32, highest: float, row: RowSampling) -> RowResult:
    if row.target >= 0:
        token_id = row.target
    else:
        adjusted = _adjust(logits, row)
        token_id = int(adjusted.argmax()) if row.temperature == 0.0 else _draw(adjusted, row)
    if row.target < 0 and row.num_logprobs < 0:
        return RowResult(token_id, math.nan, (), True)
    log_sum = highest + math.log(np.exp(logits - np.float32(highest)).sum(dtype=np.float64))
    top = _top_k(logits, row.num_logprobs) if row.num_logprobs > 0 else ()
    return RowResult(
        token_id,
        min(float(logits[token_id]) - log_sum, 0.0),
        tuple((int(i), min(float(logits[i]) - log_sum, 0.0)) for i in top),
        True,
    )


def _adjust(logits: F32, row: RowSampling) -> F32:
    """Bias, penalties (repetition, then frequency and presence) and banned tokens; a copy where anything changes."""
    penalised = row.repetition_penalty != 1.0 or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0
    if not (penalised or row.logit_bias or row.banned):
        return logits
    logits = logits.copy()
    for token_id, bias in row.logit_bias:
        logits[token_id] += np.float32(bias)
    if row.repetition_penalty != 1.0:
        seen = np.unique(np.array([*row.prompt_ids, *row.output_ids], np.int64))
        penalty = np.float32(row.repetition_penalty)
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    if row.presence_penalty != 0.0 or row.frequency_penalty != 0.0:
        seen, counts = np.unique(np.array(row.output_ids, np.int64), return_counts=True)
        logits[seen] -= np.float32(row.frequency_penalty) * counts.astype(np.float32)
        logits[seen] -= np.float32(row.presence_penalty)
    np.clip(logits, -_LARGEST, _LARGEST, out=logits)
    logits[list(row.banned)] = -np.inf
    return logits


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Tokens that may be drawn, float64 `scaled` = (logit - highest) / temperature <= 0."""

    ids: I64
    scaled: F64


def _draw(logits: F32, row: RowSampling) -> int:
    candidates = _candidates(logits, row)
    ids, scaled = candidates.ids, candidates.scaled
    is_head = scaled >= -_HEAD
    winner, best = _best(ids[is_head], scaled[is_head], row)
    # Exact: the noise is bounded, so what is further below the winner than the bound cannot have won.
    is_tail = ~is_head & (scaled > best - MAX_GUMBEL)
    if is_tail.any():
        tail_winner, tail_best = _best(ids[is_tail], scaled[is_tail], row)
        if (tail_best, -tail_winner) > (best, -winner):
            return tail_winner
    return winner


def _best(ids: I64, scaled: F64, row: RowSampling) -> tuple[int, float]:
    values = scaled + gumbel(row.seed, row.position, ids)
    best = values.max()
    return int(ids[values == best].min()), float(best)


def _candidates(logits: F32, row: RowSampling) -> _Candidates:
    highest = float(logits.max())
    top_k = row.top_k if 0 < row.top_k < len(logits) else 0
    if top_k:
        ids = _top_k(logits, top_k)
        scaled = (logits[ids].astype(np.float64) - highest) / row.temperature
        if row.top_p < 1.0:
            weights = np.exp(scaled)
            keep = _nucleus(weights, row.top_p * float(weights.sum()))
            ids, scaled = ids[:keep], scaled[:keep]
    elif row.top_p < 1.0:
        ids, scaled = _top_p(logits, highest, row)
    else:
        ids = np.arange(len(logits))
        scaled = (logits.astype(np.float64) - highest) / row.temperature
    if row.min_p > 0.0:
        keep_p = scaled >= math.log(row.min_p)
        ids, scaled = ids[keep_p], scaled[keep_p]
    return _Candidates(ids, scaled)


def _top_p(logits: F32, highest: float, row: RowSampling) -> tuple[I64, F64]:
    """The smallest prefix of the ranks that holds `top_p` of all probability: ids in any order, and their `scaled`.

    Sorting a vocabulary is slow. A histogram over `scaled` finds the bin in which the sum passes `top_p`; the bins
    before it are kept whole, and only that one is sorted.
    """
    scaled32 = (logits - np.float32(highest)) / np.float32(row.temperature)
    bins = np.minimum(scaled32 * np.float32(-_BINS_PER_UNIT), np.float32(_NUM_BINS - 1)).astype(np.int64)
    sums = np.cumsum(np.bincount(bins, weights=np.exp(scaled32), minlength=_NUM_BINS))
    edge = int(np.searchsorted(sums, row.top_p * sums[-1]))
    before = np.flatnonzero(bins < edge)
    at_edge = np.flatnonzero(bins == edge)
    at_edge = at_edge[np.argsort(-logits[at_edge], kind="stable")]
    sum_before = sums[edge - 1] if edge else 0.0
    keep = _nucleus(np.exp(scaled32[at_edge], dtype=np.float64), row.top_p * sums[-1] - sum_before)
    ids = np.concatenate((before, at_edge[:keep]))
    return ids, (logits[ids].astype(np.float64) - highest) / row.temperature


def _nucleus(weights: F64, wanted: float) -> int:
    """How many of the ranked weights it takes to add up to `wanted`; at least one, at most all."""
    return min(int(np.searchsorted(np.cumsum(weights), wanted)) + 1, len(weights))


def _top_k(logits: F32, k: int) -> I64:
    """Ids of the k highest logits in rank order: by logit, equal logits by id."""
    k = min(k, len(logits))
    kth = np.partition(logits, len(logits) - k)[len(logits) - k]
    above = np.flatnonzero(logits > kth)
    ids = np.concatenate((above, np.flatnonzero(logits == kth)[: k - len(above)]))
    return ids[np.lexsort((ids, -logits[ids]))]
