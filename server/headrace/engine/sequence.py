"""One sequence: its tokens, its block table and how far its KV has been computed. Owned by the scheduler.

There are no phases. `num_computed` catches up with `num_to_compute`; a prompt, a chunk of it, the next token and a
sequence that lost its blocks differ only in how far apart the two are.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from headrace.engine.config import INT32_MAX
from headrace.engine.timeline import Timeline
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
        "conversation",
        "credit",
        "deadline",
        "first_scheduled_at",
        "first_token_at",
        "full_blocks",
        "host_table",
        "id",
        "is_held",
        "is_score",
        "lease",
        "logit_bias",
        "max_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_registered",
        "num_scored",
        "num_swapped",
        "order",
        "outputs",
        "pending_row",
        "priority",
        "progress_at_preemption",
        "prompt",
        "salt",
        "sampling",
        "standing",
        "status",
        "submitted_at",
        "tenant",
        "timeline",
        "tokens",
        "was_parked",
    )

    def __init__(self, request: SequenceRequest, order: int, now: float) -> None:
        self.id = request.id
        self.order = order  # of acceptance
        self.tenant = request.tenant
        self.priority = request.priority  # 0 is the most urgent class
        self.standing = request.priority  # class in which it runs; set when it is admitted
        self.prompt = request.prompt
        self.tokens = [*request.prompt, *request.held]  # prompt and outputs
        self.outputs: list[int] = list(request.held)
        self.sampling = request.sampling
        self.logit_bias = tuple(request.sampling.logit_bias.items())
        self.max_tokens = request.sampling.max_tokens
        self.is_score = request.score
        self.salt = request.salt
        self.deadline = request.deadline
        self.conversation = request.conversation
        self.lease = request.lease
        self.credit = request.credit if request.credit >= 0 else INT32_MAX  # outputs that it may have so far
        self.is_held = False  # the front end does not want it to run
        self.was_parked = False
        self.status = Status.WAITING

        self.num_computed = 0  # leading tokens whose KV is in the blocks
        self.num_scored = 0  # leading positions whose next token has been scored
        self.block_table: list[int] = []  # grows by append; `BlockManager.release` puts a new list in its place
        self.full_blocks: list[BlockContent] = []  # of `tokens`, as far as anybody has asked
        self.host_table: list[int] = []  # host blocks that hold its KV while it has no others (`swap.HostPool`)
        self.num_swapped = 0  # leading tokens whose KV is there
        self.num_registered = 0  # leading blocks that are settled with the prefix cache
        self.progress_at_preemption = -1  # `progress` when its blocks were last taken; -1: it may be preempted

        self.pending_row = -1  # row of results, in the step in flight, that is its newest token; -1: none is
        self.num_cached_tokens = 0  # prompt tokens found in the prefix cache at first admission
        self.submitted_at = request.arrival or now
        self.first_scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.timeline = Timeline() if request.is_traced else None

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
    def may_run(self) -> bool:
        """Whether the front end takes another output of it."""
        return not self.is_held and len(self.outputs) < self.credit

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
            timeline=self.timeline.events() if self.timeline is not None else (),
        )
