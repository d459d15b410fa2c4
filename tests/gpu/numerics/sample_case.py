"""Runs the device's sampling on numpy logits and compares it with the reference. Used by test_sample*.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from headrace.kernels.batch import RowResult, RowSampling
from headrace.kernels.philox import gumbel
from headrace.kernels.sample import sample as reference
from headrace.kernels.sample.device import DeviceTokens, pack_sampling, results, upload
from headrace.kernels.sample.triton import sample, workspace_bytes

F32 = npt.NDArray[np.float32]
NEAR = 3e-5  # logit / temperature + noise in float32: candidates this close may change places
LOGPROB_TOLERANCE = 1e-5


def run(
    logits: F32,
    rows: Sequence[RowSampling],
    device: str,
    *,
    pending: Sequence[int] | None = None,
    previous: torch.Tensor | None = None,
) -> list[RowResult]:
    """The results of one step. Output and workspace are poisoned before; the logits must be as before afterwards."""
    packed = pack_sampling(rows, pending)
    buffer = torch.empty(len(packed.words), dtype=torch.int32, device=device)
    params = upload(packed, torch.empty(len(packed.words), dtype=torch.int32), buffer)
    words = torch.full((DeviceTokens.words_for(len(rows)),), -7, dtype=torch.int32, device=device)
    size = workspace_bytes(len(rows), logits.shape[1], packed.num_entries)
    on_device = torch.full((len(rows), logits.shape[1] + 4), torch.nan, device=device)[:, : logits.shape[1]]
    on_device.copy_(torch.from_numpy(logits))
    workspace = torch.full((size // 4,), torch.nan, device=device)
    sample(on_device, params, DeviceTokens.of(words, len(rows)), workspace, previous=previous)
    assert np.array_equal(on_device.cpu().numpy().view(np.int32), logits.view(np.int32)), "logits were changed"
    return results(DeviceTokens.of(words.cpu(), len(rows)), rows)


def check(logits: F32, rows: Sequence[RowSampling], device: str) -> None:
    """Every row as the reference has it, but for tokens whose values are as good as equal."""
    for got, want, row, line in zip(run(logits, rows, device), reference(logits, rows), rows, logits, strict=True):
        assert got.is_finite == want.is_finite
        if not want.is_finite:
            assert (got.token_id, got.top) == (max(row.target, 0), ())
            continue
        if got.token_id != want.token_id:
            assert is_near(line, row, got.token_id, want.token_id), (got, want, row)
            continue
        near(got.logprob, want.logprob)
        assert [i for i, _ in got.top] == [i for i, _ in want.top]
        for (_, value), (_, expected) in zip(got.top, want.top, strict=True):
            near(value, expected)


def near(got: float, want: float) -> None:
    assert (math.isnan(got) and math.isnan(want)) or abs(got - want) < LOGPROB_TOLERANCE * max(1.0, abs(want)), (
        got,
        want,
    )


def is_near(line: F32, row: RowSampling, first: int, second: int) -> bool:
    """Whether two tokens of a row without penalties have the same logit / temperature + noise, to float32's last
    places."""
    if row.temperature == 0.0:
        return False
    ids = np.array([first, second])
    noise = gumbel(row.seed, row.position, ids)
    a, b = line[ids].astype(np.float64) / row.temperature + noise
    return bool(abs(a - b) < NEAR)


def random_row(rng: np.random.Generator, vocab_size: int) -> RowSampling:
    """Any mixture of settings."""

    def some(chance: float) -> bool:
        return bool(rng.random() < chance)

    row = RowSampling(
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7])),
        top_k=int(rng.choice([1, 2, 5, 20, 50, vocab_size + 3])) if some(0.5) else 0,
        top_p=float(rng.choice([0.05, 0.5, 0.9, 0.99])) if some(0.5) else 1.0,
        min_p=float(rng.choice([0.01, 0.2, 1.0])) if some(0.3) else 0.0,
        seed=int(rng.integers(0, 2**63)),
        position=int(rng.integers(0, 2**20)),
        num_logprobs=int(rng.choice([-1, 0, 1, 5, 20])),
    )
    if some(0.3):
        prompt, output = (tuple(rng.integers(0, vocab_size, n).tolist()) for n in (30, 20))
        penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}
        row = replace(row, **penalties, prompt_ids=prompt, output_ids=output)
    if some(0.3):
        row = replace(row, banned=tuple(rng.choice(vocab_size, vocab_size // 3, replace=False).tolist()))
    if some(0.3):
        row = replace(row, logit_bias=((1, 2.5), (3, -4.0), (1, 1.0)))
    return row
