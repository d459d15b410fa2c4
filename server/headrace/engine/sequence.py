"""One sequence: its tokens, its block table and how far its KV has been computed. Owned by the scheduler.

There are no phases. `num_computed` catches up with `num_to_compute`; a prompt, a chunk of it, the next token and a
sequence that lost its blocks differ only in how far apart the two are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from headrace.engine.types import FinishOutput, FinishReason, SequenceRequest


class Status(Enum):
    WAITING = auto()  # wants to run
    RUNNING = auto()  # may be scheduled in every step
    PARKED = auto()  # must not be scheduled; may still hold blocks
    FINISHED = auto()


@dataclass(frozen=True)
class BlockContent:
    """What a full block of KV was computed from: enough to tell a true cache hit from a hash collision."""

    hash: bytes  # of this block and all before it
    parent: bytes  # hash of the block before it; of the salt for the first
    tokens: bytes  # token ids as native int32


class Sequence:
    """Mutable state of one accepted request. Only the scheduler and the block manager write to it."""

    __slots__ = (
        "block_table",
        "deadline",
        "first_scheduled_at",
        "first_token_at",
        "full_blocks",
        "id",
        "is_score",
        "logit_bias",
        "max_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_registered",
        "num_scored",
        "order",
        "outputs",
        "pending_row",
        "progress_at_preemption",
        "prompt",
        "salt",
        "sampling",
        "status",
        "submitted_at",
        "tokens",
    )

    def __init__(self, request: SequenceRequest, order: int, now: float) -> None:
        self.id = request.id
        self.order = order  # of acceptance; smaller is served first
        self.prompt = request.prompt
        self.tokens = list(request.prompt)  # prompt and outputs
        self.outputs: list[int] = []
        self.sampling = request.sampling
        self.logit_bias = tuple(request.sampling.logit_bias.items())
        self.max_tokens = request.sampling.max_tokens
        self.is_score = request.score
        self.salt = request.salt
        self.deadline = request.deadline
        self.status = Status.WAITING

        self.num_computed = 0  # leading tokens whose KV is in the blocks
        self.num_scored = 0  # leading positions whose next token has been scored
        self.block_table: list[int] = []  # grows by append; `BlockManager.release` puts a new list in its place
        self.full_blocks: list[BlockContent] = []  # of `tokens`, as far as anybody has asked
        self.num_registered = 0  # leading blocks that are settled with the prefix cache
        self.progress_at_preemption = -1  # `progress` when its blocks were last taken; -1: it may be preempted

        self.pending_row = -1  # row of results, in the step in flight, that is its newest token; -1: none is
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at first admission
        self.submitted_at = request.arrival or now
        self.first_scheduled_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def num_to_compute(self) -> int:
        """Tokens whose KV the next output needs. The last token of a text to score predicts nothing; a token that the
        step in flight samples counts although nobody knows it yet."""
        return len(self.tokens) - 1 if self.is_score else len(self.tokens) + self.has_pending

    @property
    def has_pending(self) -> bool:
        """Whether the step in flight samples a token of this sequence that the next step may start from."""
        return self.pending_row >= 0

    @property
    def progress(self) -> int:
        """Outputs delivered so far: tokens generated, or positions scored."""
        return self.num_scored if self.is_score else len(self.outputs)

    @property
    def is_preemptible(self) -> bool:
        """Not before it has delivered something since its blocks were last taken: this is what rules out thrashing."""
        return self.progress > self.progress_at_preemption

    def num_new_blocks(self, block_size: int) -> int:
        """Blocks missing from the table for all tokens to compute."""
        return -(-self.num_to_compute // block_size) - len(self.block_table)

    def finish_output(self, reason: FinishReason, now: float, *, error: str | None, stop: int | None) -> FinishOutput:
        """The sequence's only terminal event. The three times (seconds) add up to `now - submitted_at`."""
        scheduled = now if self.first_scheduled_at is None else self.first_scheduled_at
        first = now if self.first_token_at is None else self.first_token_at
        return FinishOutput(
            reason=reason,
            stop_token_id=stop,
            error=error,
            num_prompt_tokens=len(self.prompt),
            num_cached_tokens=self.num_cached_tokens,
            num_output_tokens=len(self.outputs),
            queue_seconds=max(0.0, scheduled - self.submitted_at),
            prefill_seconds=max(0.0, first - scheduled),
            decode_seconds=max(0.0, now - first),
        )
