"""The engine: accepts sequences, runs them step by step, answers each exactly once. Owned by one thread.

`headrace.server`'s engine process and `bench/engine.py` drive it:

    engine.add(request)
    while engine.has_work():
        for output in engine.step(): ...
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq

import msgspec
from headrace.engine.batch import BatchBuilder
from headrace.engine.config import EngineConfig
from headrace.engine.errors import ConfigError, InvalidSequenceError, QueueFullError
from headrace.engine.integrity import check_integrity
from headrace.engine.pipeline import Pipeline, StepResults, share_out
from headrace.engine.scheduler import ScheduledSequence, Scheduler
from headrace.engine.sequence import Sequence
from headrace.engine.swap import Swap
from headrace.engine.types import EngineStats, SequenceOutput, SequenceRequest, StepRecord
from headrace.kernels.batch import Executor, ExecutorLostError, PipelinedExecutor, SwappingExecutor

log = logging.getLogger(__name__)


class Engine:
    """Synchronous. Calls other than `step` take effect at once; what they have to say comes with the next step."""

    def __init__(self, executor: Executor, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """clock: seconds; deadlines and arrivals of requests are on it. Raises ConfigError where there are host blocks
        and the executor cannot use them."""
        if config.num_host_blocks and not isinstance(executor, SwappingExecutor):
            raise ConfigError([f"executor {executor.name} cannot swap KV blocks: num_host_blocks must be 0"])
        self.config = config
        self._executor = executor
        self._clock = clock
        self._scheduler = Scheduler(config)
        self._batches = BatchBuilder(config)
        self._num_accepted = 0
        self._num_step_failures = 0
        self._pipeline: Pipeline | None = None
        if isinstance(executor, PipelinedExecutor):
            self._pipeline = Pipeline(executor, self._batches, self._execute, self._swap)

    def add(self, request: SequenceRequest) -> None:
        """Accept a sequence. Raises InvalidSequenceError (it could never run) or QueueFullError (not now)."""
        _validate(request, self.config)
        if request.id in self._scheduler.live:
            raise InvalidSequenceError("id", "a sequence with this id is still in the engine")
        self._check_queue(len(request.prompt) + len(request.held))
        self._scheduler.add(Sequence(request, self._num_accepted, self._clock()))
        self._num_accepted += 1

    def cancel(self, sequence_id: int) -> None:
        """End a sequence with reason "cancelled"; its blocks are free at once. Unknown or ended: no change."""
        seq = self._scheduler.live.get(sequence_id)
        if seq is not None:
            self._scheduler.finish(seq, "cancelled", self._clock())

    def set_max_tokens(self, sequence_id: int, max_tokens: int) -> None:
        """Change the limit of a sequence's output tokens; at or below what it has, it ends with reason "length".

        An unknown or ended id changes nothing. Raises InvalidSequenceError where an add would.
        """
        seq = self._scheduler.live.get(sequence_id)
        if seq is None:
            return
        if seq.is_score:
            raise InvalidSequenceError("score", "a text to score has no max_tokens")
        _validate_length(len(seq.prompt), max_tokens, self.config)
        seq.max_tokens = max_tokens
        if len(seq.outputs) >= max_tokens:
            self._scheduler.finish(seq, "length", self._clock())

    def set_stop_tokens(self, sequence_id: int, token_ids: Seq[int]) -> None:
        """Change the tokens that end a sequence; those it has already are not looked at again.

        An unknown or ended id changes nothing. Raises InvalidSequenceError where an add would.
        """
        seq = self._scheduler.live.get(sequence_id)
        if seq is not None:
            _validate_token_ids("stop_token_ids", token_ids, self.config)
            seq.sampling = msgspec.structs.replace(seq.sampling, stop_token_ids=tuple(token_ids))

    def grant(self, sequence_id: int, credit: int) -> None:
        """Let a sequence have so many output tokens in all; with that many it is parked, until the next grant or its
        end. Unknown or ended: no change."""
        seq = self._scheduler.live.get(sequence_id)
        if seq is not None:
            self._scheduler.grant(seq, credit)

    def unpin(self, conversation: int) -> None:
        """Nobody comes back to a conversation: its KV may be evicted before its lease ends. Unknown: no change."""
        self._scheduler.blocks.unpin(conversation)

    def park(self, sequence_id: int) -> None:
        """Do not schedule a sequence until `unpark`: nobody reads what it says. Unknown or parked: no change."""
        seq = self._scheduler.live.get(sequence_id)
        if seq is not None:
            self._scheduler.park(seq)
            if seq.timeline is not None:
                seq.timeline.note("parked", self._clock())

    def unpark(self, sequence_id: int) -> None:
        """Let a parked sequence go on. Unknown or not parked: no change."""
        seq = self._scheduler.live.get(sequence_id)
        if seq is not None:
            self._scheduler.unpark(seq)

    def step(self) -> list[SequenceOutput]:
        """Run one step. At most one output per sequence: what is new since the last step. Never raises for what the
        executor did: that is charged to the sequences that caused it. But ExecutorLostError: nothing can run then."""
        scheduler = self._scheduler
        now = self._clock()
        scheduler.expire(now)
        outputs, scheduler.outputs = scheduler.outputs, []
        if self._pipeline is not None:
            return outputs + self._pipeline.step(scheduler, self._clock)
        plan = scheduler.schedule(now)
        self._swap(plan.swaps)
        if plan.sequences:
            results = self._execute(plan.sequences)
            outputs += scheduler.update(plan, results, self._clock())
        return outputs

    @property
    def executor(self) -> Executor:
        """What it runs on."""
        return self._executor

    @property
    def last_step(self) -> StepRecord | None:
        """The last step that is done; its number tells it from the one before."""
        return self._scheduler.last_step

    def has_work(self) -> bool:
        """Whether `step` has something to do or to say now. False with parked sequences only; see `next_deadline`."""
        is_under_way = self._pipeline is not None and self._pipeline.is_under_way
        return bool(self._scheduler.outputs or self._scheduler.waiting or self._scheduler.running or is_under_way)

    def next_deadline(self) -> float | None:
        """The earliest deadline of all sequences, parked ones included, or end of a lease: call `step` then, whatever
        `has_work` says."""
        times = [s.deadline for s in self._scheduler.live.values() if s.deadline is not None]
        earliest = min(times, default=math.inf)
        earliest = min(earliest, self._scheduler.blocks.pins.next_end)
        return earliest if math.isfinite(earliest) else None

    def stats(self) -> EngineStats:
        """A snapshot."""
        scheduler, estimates = self._scheduler, self._scheduler.estimates
        return EngineStats(
            num_steps=scheduler.num_steps,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_free_blocks=scheduler.blocks.num_free,
            num_cached_blocks=len(scheduler.blocks.evictable),
            num_total_blocks=self.config.num_blocks - 1,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_queries=scheduler.num_prefix_queries,
            num_prefix_hits=scheduler.num_prefix_hits,
            num_parked=len(scheduler.parked),
            num_step_failures=self._num_step_failures,
            step_seconds=estimates.step.fixed,
            step_token_seconds=estimates.step.per_token,
            token_seconds=estimates.token_seconds,
            residence_seconds=estimates.residence_seconds,
            output_share=estimates.output_share,
            cached_share=estimates.cached_share,
            num_swapped_out=scheduler.host.num_swapped_out,
            num_host_blocks=scheduler.host.num_blocks,
            num_free_host_blocks=len(scheduler.host.free),
            num_pinned_blocks=len(scheduler.blocks.resting),
            num_pins_lost=scheduler.blocks.num_pins_lost,
        )

    def check_integrity(self) -> None:
        """Prove that no block is lost or owned twice. Raises AssertionError. Between steps only."""
        check_integrity(self._scheduler)

    def _check_queue(self, num_tokens: int) -> None:
        """Everything accepted and not running counts, or parking would let the engine take in more and more."""
        queued = [*self._scheduler.waiting, *self._scheduler.parked.values()]
        if len(queued) >= self.config.max_waiting_seqs:
            raise QueueFullError("sequences", f"{len(queued)} sequences are waiting")
        num_waiting = sum(len(seq.tokens) for seq in queued)
        if num_waiting + num_tokens > self.config.max_waiting_tokens:
            raise QueueFullError("tokens", f"{num_waiting} tokens are waiting")

    def _swap(self, swaps: Seq[Swap]) -> None:
        """Have the blocks copied that a plan moves; whatever becomes of its step, they have changed hands."""
        for swap in swaps:
            assert isinstance(self._executor, SwappingExecutor)
            copy = self._executor.swap_in if swap.is_in else self._executor.swap_out
            copy(swap.blocks, swap.host_blocks)

    def _execute(self, items: Seq[ScheduledSequence]) -> StepResults:
        """Run items; where the executor raises, run halves, so that only the guilty get None (RELIABILITY: bisect).

        Running a sequence's rows again is harmless: they write the same KV to the same slots, which nobody shares yet.
        """
        try:
            return share_out(items, self._executor.execute(self._batches.build(items)))
        except ExecutorLostError:
            raise
        except Exception:
            self._num_step_failures += 1
            log.exception("a step of %d sequences failed", len(items))
            if len(items) == 1:
                return [None]
            half = len(items) // 2
            return self._execute(items[:half]) + self._execute(items[half:])


def _validate(request: SequenceRequest, config: EngineConfig) -> None:
    """What would make the engine fail later on; ranges of parameters are the front end's business."""
    params = request.sampling
    if len(request.prompt) < (2 if request.score else 1):
        raise InvalidSequenceError("prompt", "the prompt is empty" if not request.score else "scoring needs 2 tokens")
    _validate_length(len(request.prompt), 0 if request.score else params.max_tokens, config, is_score=request.score)
    for field, ids in (
        ("prompt", request.prompt),
        ("held", request.held),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
    ):
        _validate_token_ids(field, ids, config)
    if len(request.held) >= max(1, params.max_tokens) or (request.held and request.score):
        raise InvalidSequenceError("held", "nothing is left to generate after the tokens held")


def _validate_token_ids(field: str, ids: Collection[int], config: EngineConfig) -> None:
    if ids and not (min(ids) >= 0 and max(ids) <= config.max_token_id):
        raise InvalidSequenceError(field, f"{field} has a token id outside the vocabulary")


def _validate_length(num_prompt: int, max_tokens: int, config: EngineConfig, is_score: bool = False) -> None:
    if max_tokens < 1 and not is_score:
        raise InvalidSequenceError("max_tokens", "max_tokens must be at least 1")
    limit = config.max_sequence_len
    if num_prompt + (not is_score) > limit:
        raise InvalidSequenceError(
            "prompt", f"the prompt has {num_prompt} tokens, the limit is {limit} with the output"
        )
    if num_prompt + max_tokens > limit:
        raise InvalidSequenceError(
            "max_tokens", f"{num_prompt} prompt tokens and {max_tokens} max_tokens exceed the limit of {limit}"
        )
