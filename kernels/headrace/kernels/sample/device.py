"""A step's sampling parameters and its tokens as device tensors. Called by the GPU executor; torch, no triton.

`pack_sampling` turns `RowSampling` into one array of 32-bit words on the host, `upload` sends it in one copy, and
`triton.py` reads it. `DeviceTokens` stay on the device for the next step; `results` reads their host copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from headrace.kernels.batch import RowResult, RowSampling

I32 = npt.NDArray[np.int32]

MAX_TOP = 20  # most likely tokens that can be asked for

# What a row of parameters holds, 32 bits each; a float's bits where the name is in FLOAT_FIELDS.
FIELDS = (
    "mode",  # one of MODES
    "target",
    "temperature",
    "top_k",  # 0: no limit
    "top_p",  # 1: no limit
    "log_min_p",  # -inf: no limit
    "repetition",
    "presence",
    "frequency",
    "seed_low",
    "seed_high",
    "position",
    "num_top",
    "wants_logprob",
    "first_entry",  # entries first_entry .. last_entry - 1 are the row's
    "last_entry",
    "pending",  # row of the step before whose token is the newest output, which no entry counts yet; -1: none
)
FLOAT_FIELDS = ("temperature", "top_p", "log_min_p", "repetition", "presence", "frequency")
# best: the highest logit. draw: every token may be drawn. select: penalties or filters come first. score: the target.
MODES = ("best", "draw", "select", "score")

# An entry: one token of one row whose logit changes. (token id, occurrences in the output, flags, bias as float bits)
ENTRY_WORDS = 4
IS_SEEN, IS_BANNED = 1, 2  # flags: in prompt or output; must not be chosen


@dataclass(frozen=True, eq=False)
class PackedSampling:
    """The parameters of S rows with E entries on the host.

    words: int32 [S * 17 + E * 4]. num_top: the largest number of most likely tokens wanted. has_select: a row is in
    mode "select". has_pending: a row counts a token of the step before.
    """

    words: I32
    num_rows: int
    num_entries: int
    num_top: int
    has_select: bool
    has_pending: bool = False


@dataclass(frozen=True, eq=False)
class DeviceSampling:
    """`PackedSampling` on the device. rows: int32 [S, 17]; entries: int32 [E, 4]."""

    rows: torch.Tensor
    entries: torch.Tensor
    num_top: int
    has_select: bool
    has_pending: bool = False


@dataclass(frozen=True, eq=False)
class DeviceTokens:
    """What was sampled, on the device (or its copy on the host): views of `words`, int32 [(3 + 2 * 20) * S].

    token_ids: int32 [S], always a valid id. logprob: float32 [S], NaN where not asked for. is_finite: int32 [S], 0 or
    1. top_ids, top_logprobs: [S, 20], of which the first num_logprobs of a row are set, to -1 past the vocabulary.
    """

    words: torch.Tensor
    token_ids: torch.Tensor
    logprob: torch.Tensor
    is_finite: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor

    @staticmethod
    def of(words: torch.Tensor, num_rows: int) -> DeviceTokens:
        """The tokens of num_rows rows in int32 words, at least `words_for(num_rows)` of them."""
        words = words[: DeviceTokens.words_for(num_rows)]
        flat, tops = words[: 3 * num_rows].view(3, num_rows), words[3 * num_rows :].view(2, num_rows, MAX_TOP)
        return DeviceTokens(words, flat[0], flat[1].view(torch.float32), flat[2], tops[0], tops[1].view(torch.float32))

    @staticmethod
    def words_for(num_rows: int) -> int:
        return (3 + 2 * MAX_TOP) * num_rows


def pack_sampling(rows: Sequence[RowSampling], pending: Sequence[int] | None = None) -> PackedSampling:
    """The rows as the kernels read them. ValueError where more than MAX_TOP most likely tokens are asked for.

    pending: for a row whose newest output token is still on the device, and so not in its output_ids, the row of the
    step before that sampled it; -1 for the others.
    """
    modes = [_mode(row) for row in rows]
    entries = [_entries(row) for row in rows]
    ends = np.cumsum([len(of_row) for of_row in entries], dtype=np.int64)
    num_entries = int(ends[-1]) if rows else 0
    words = np.empty(words_for(len(rows), num_entries), np.int32)
    table = words[: len(rows) * len(FIELDS)].reshape(len(rows), len(FIELDS))
    _fill(table, rows, [MODES.index(mode) for mode in modes])
    table[:, FIELDS.index("last_entry")] = ends
    table[:, FIELDS.index("first_entry")] = ends - [len(of_row) for of_row in entries]
    is_pending = [pending is not None and pending[i] >= 0 and _is_penalised(row) for i, row in enumerate(rows)]
    table[:, FIELDS.index("pending")] = [
        pending[i] if pending is not None and is_pending[i] else -1 for i in range(len(rows))
    ]
    if num_entries:
        np.concatenate(entries, out=words[table.size :].reshape(num_entries, ENTRY_WORDS))
    num_top = max((row.num_logprobs for row in rows), default=0)
    if num_top > MAX_TOP:
        raise ValueError(f"{num_top} most likely tokens asked for, at most {MAX_TOP} can be had")
    return PackedSampling(words, len(rows), num_entries, max(num_top, 0), "select" in modes, any(is_pending))


def upload(packed: PackedSampling, staging: torch.Tensor, buffer: torch.Tensor) -> DeviceSampling:
    """Copy to the device without waiting.

    staging: int32 in pinned host memory, not to be written again before the copy is done; buffer: int32 on the device.
    ValueError where either is too short.
    """
    size = len(packed.words)
    if len(staging) < size or len(buffer) < size:
        raise ValueError(f"sampling: {size} words, staging holds {len(staging)} and the device buffer {len(buffer)}")
    staging.numpy()[:size] = packed.words
    buffer[:size].copy_(staging[:size], non_blocking=True)
    return as_device(packed, buffer)


def as_device(packed: PackedSampling, buffer: torch.Tensor) -> DeviceSampling:
    """The parameters whose words the device finds at the start of `buffer`."""
    split = words_for(packed.num_rows, 0)
    return DeviceSampling(
        buffer[:split].view(packed.num_rows, len(FIELDS)),
        buffer[split : len(packed.words)].view(packed.num_entries, ENTRY_WORDS),
        packed.num_top,
        packed.has_select,
        packed.has_pending,
    )


def words_for(num_rows: int, num_entries: int) -> int:
    """int32 words that `upload` needs."""
    return num_rows * len(FIELDS) + num_entries * ENTRY_WORDS


def results(tokens: DeviceTokens, rows: Sequence[RowSampling]) -> list[RowResult]:
    """The results of a step from the host copy of its tokens."""
    token_ids, logprob, is_finite = tokens.token_ids.tolist(), tokens.logprob.tolist(), tokens.is_finite.tolist()
    return [
        RowResult(
            token_ids[i], logprob[i], _top(tokens, i, row.num_logprobs if is_finite[i] else 0), bool(is_finite[i])
        )
        for i, row in enumerate(rows)
    ]


def _top(tokens: DeviceTokens, row: int, num_top: int) -> tuple[tuple[int, float], ...]:
    if num_top <= 0:
        return ()
    pairs = zip(tokens.top_ids[row, :num_top].tolist(), tokens.top_logprobs[row, :num_top].tolist(), strict=True)
    return tuple((token_id, logprob) for token_id, logprob in pairs if token_id >= 0)


def _mode(row: RowSampling) -> str:
    if row.target >= 0:
        return "score"
    if _is_penalised(row) or row.logit_bias or row.banned:
        return "select"
    if row.temperature == 0.0:
        return "best"
    return "select" if row.top_k > 0 or row.top_p < 1.0 or row.min_p > 0.0 else "draw"


def _is_penalised(row: RowSampling) -> bool:
    return row.repetition_penalty != 1.0 or row.presence_penalty != 0.0 or row.frequency_penalty != 0.0


def _fill(table: I32, rows: Sequence[RowSampling], modes: Sequence[int]) -> None:
    """Column by column: a loop over rows in Python would cost more than the kernels."""
    tiny = float(np.finfo(np.float32).tiny)
    columns: dict[str, Sequence[float]] = {
        "mode": modes,
        "target": [row.target for row in rows],
        "temperature": [max(row.temperature, tiny) if row.temperature > 0.0 else 0.0 for row in rows],
        "top_k": [row.top_k for row in rows],
        "top_p": [row.top_p for row in rows],
        "log_min_p": [math.log(row.min_p) if row.min_p > 0.0 else -math.inf for row in rows],
        "repetition": [row.repetition_penalty for row in rows],
        "presence": [row.presence_penalty for row in rows],
        "frequency": [row.frequency_penalty for row in rows],
        "seed_low": [row.seed & 0xFFFFFFFF for row in rows],
        "seed_high": [row.seed >> 32 for row in rows],
        "position": [row.position for row in rows],
        "num_top": [max(row.num_logprobs, 0) for row in rows],
        "wants_logprob": [row.target >= 0 or row.num_logprobs >= 0 for row in rows],
    }
    floats = table.view(np.float32)
    for name, values in columns.items():
        if name in FLOAT_FIELDS:
            floats[:, FIELDS.index(name)] = np.array(values, np.float64)
        else:
            table[:, FIELDS.index(name)] = np.array(values, np.int64).astype(np.uint32).view(np.int32)


def _entries(row: RowSampling) -> I32:
    """int32 [n, 4], each token id once."""
    is_penalised = _is_penalised(row)
    if row.target >= 0 or not (is_penalised or row.logit_bias or row.banned):
        return np.empty((0, ENTRY_WORDS), np.int32)
    prompt = np.asarray(row.prompt_ids if is_penalised else (), np.int64)
    output = np.asarray(row.output_ids if is_penalised else (), np.int64)
    biased = np.array([token_id for token_id, _ in row.logit_bias], np.int64)
    banned = np.array(row.banned, np.int64)
    ids, where = np.unique(np.concatenate((prompt, output, biased, banned)), return_inverse=True)
    of_seen, of_biased, of_banned = np.split(where, np.cumsum([len(prompt) + len(output), len(biased)]))
    table = np.zeros((len(ids), ENTRY_WORDS), np.int32)
    table[:, 0] = ids
    table[:, 1] = np.bincount(of_seen[len(prompt) :], minlength=len(ids))
    table[of_seen, 2] |= IS_SEEN
    table[of_banned, 2] |= IS_BANNED
    np.add.at(table.view(np.float32)[:, 3], of_biased, np.array([bias for _, bias in row.logit_bias], np.float32))
    return table
