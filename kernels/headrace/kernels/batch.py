"""What an executor gets and gives in one step: plain numpy arrays, the contract between engine and executors.

The engine builds a `StepBatch` (`headrace.engine.batch`); an `Executor` runs the step program on it and samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RowSampling:
    """How to treat one row of logits.

    target >= 0: score that token (its log-probability) instead of sampling. Otherwise sample the token that will stand
    at `position` (0-based in the sequence), with Philox keyed by `seed` and counted by (position, token id).
    The arrays of token ids are those that the penalties look at.
    """

    target: int = -1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    banned: tuple[int, ...] = ()  # token ids that must not be chosen (end tokens before min_tokens)
    seed: int = 0
    position: int = 0
    num_logprobs: int = -1  # -1: none; 0: of the token; k: and of the k most likely
    prompt_ids: Sequence[int] = ()  # only filled where a penalty needs them
    output_ids: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class StepBatch:
    """One step. T rows (tokens) of B sequences, S of whose logits are wanted.

    Rows of a sequence are adjacent and in order. Slot s of a layer is position s % block_size of block s // block_size.
    The arrays are the engine's own and are used again for the next step: read them before `execute` returns.
    """

    token_ids: I32  # [T]
    positions: I32  # [T]
    slot_mapping: I32  # [T]
    cu_seqlens_q: I32  # [B + 1] row offsets of the sequences
    seq_lens: I32  # [B] tokens of the sequence in the KV blocks after this step
    block_tables: I32  # [B, most blocks of a sequence], padded with 0
    logit_rows: I32  # [S] rows whose logits are wanted, ascending
    sampling: tuple[RowSampling, ...]  # [S]


@dataclass(frozen=True)
class RowResult:
    """One row of logits, used up.

    token_id: the sampled token, or the target that was scored.
    logprob: natural log of its probability under the unmodified logits; NaN where not asked for.
    top: (token id, logprob) of the most likely tokens, most likely first.
    is_finite: False where the logits held NaN or infinity; token_id is then meaningless.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    is_finite: bool


class ExecutorLostError(RuntimeError):
    """The device is gone, or in a state in which nothing can run: the process must end."""


class Executor(Protocol):
    """Runs a step program. One thread at a time."""

    @property
    def name(self) -> str:
        """What `headrace doctor` and GetModel call it, e.g. "torch-cpu"."""
        ...

    def execute(self, batch: StepBatch) -> list[RowResult]:
        """Run one step; one result per row of batch.logit_rows."""
        ...


@runtime_checkable
class SwappingExecutor(Protocol):
    """An executor that can keep KV blocks in host memory: host blocks 0 .. n - 1, as many as it was made with."""

    def swap_out(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy blocks[i] to host_blocks[i], after all steps and copies asked for before and ahead of all later ones;
        may return before it is done. None appears twice."""
        ...

    def swap_in(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy host_blocks[i] to blocks[i]; as `swap_out`."""
        ...


@runtime_checkable
class PipelinedExecutor(Executor, Protocol):
    """An executor that may have a step queued while it runs another: the next step can be decided meanwhile."""

    def submit(self, batch: StepBatch) -> None:
        """Queue one step; the batch's arrays are the caller's again when this returns. Raises ValueError where the
        batch does not fit; nothing is queued then. At most two steps may be submitted and not collected.

        A token id of -1 - i stands for the token of result i of the step submitted before. Where it is the newest
        token of a row whose penalties look at output_ids, it is not among these and the executor counts it.
        """
        ...

    def collect(self) -> list[RowResult]:
        """The results of the step that was submitted first, as of `execute`; waits for it."""
        ...
