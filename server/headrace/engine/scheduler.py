"""Who computes how many tokens in the next step: the engine's policy, without tensors. Driven by `engine.Engine`.

    plan = scheduler.schedule(now)            decide, as data
    scheduler.update(plan, results, now)      act on what came back

Rules
- One token budget per step. Running sequences that need one token go first, then longer ones (chunks), each by its
  standing, then waiting ones by their urgency (`urgency.py`). EngineConfig guarantees every running sequence a token.
- A sequence is admitted when the blocks of all its tokens fit, so only new tokens need new blocks later on.
- A sequence that needs a block takes it from those behind it: first from sequences that hold blocks but do not run
  (parked ones), then from the last running one that has delivered something since its blocks were last taken.
  With nobody behind it to take from, it waits a step. Whoever lost its blocks waits again, ahead of new ones; its KV
  is kept in host memory where there is some (`swap.py`), else computed again. So who stands first always advances, and
  nobody is preempted twice without progress.
- A waiting sequence whose next prefix block is being computed by a running one waits for it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from headrace.engine.block_manager import NO_HIT, BlockManager
from headrace.engine.config import EngineConfig
from headrace.engine.estimates import Estimates
from headrace.engine.sequence import Sequence, Status
from headrace.engine.swap import HostPool, Swap
from headrace.engine.types import FinishReason, SequenceOutput, StepRecord, TokenOutput
from headrace.engine.urgency import Queue, standing


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """Rows of one sequence in a step: positions start .. start + num_tokens - 1, logits of the last num_logits."""

    seq: Sequence
    start: int
    num_tokens: int
    num_logits: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What the next step computes. Empty when nothing can run. swaps: KV blocks to copy before it, in order."""

    sequences: tuple[ScheduledSequence, ...]
    num_tokens: int
    num_logits: int
    swaps: tuple[Swap, ...] = ()
    started: float = 0.0  # when it was decided


class LogitsResult(Protocol):
    """What the policy needs to know of one row of logits (`headrace.kernels.batch.RowResult`)."""

    @property
    def token_id(self) -> int: ...
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> tuple[tuple[int, float], ...]: ...
    @property
    def is_finite(self) -> bool: ...


class Scheduler:
    """All accepted sequences, each in exactly one of waiting, running and parked."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.blocks = BlockManager(config.num_blocks, config.block_size, config.enable_prefix_cache)
        self.host = HostPool(config)
        self.queue = Queue()
        self.estimates = Estimates()
        self.live: dict[int, Sequence] = {}
        self.waiting: list[Sequence] = []  # by order of acceptance
        self.running: list[Sequence] = []  # by `standing`
        self.parked: dict[int, Sequence] = {}
        self.idle_holders: dict[int, Sequence] = {}  # not running, yet with blocks; parked longest first
        self.outputs: list[SequenceOutput] = []  # finished between steps
        self.num_preemptions = 0
        self.num_prefix_queries = 0
        self.num_prefix_hits = 0
        self.num_steps = 0
        self.last_step: StepRecord | None = None  # that was settled
        self._now = 0.0  # of the latest `schedule`

    # --- between steps

    def add(self, seq: Sequence) -> None:
        self.live[seq.id] = seq
        insort(self.waiting, seq, key=_order)
        if not seq.may_run:
            self._park(seq)

    def park(self, seq: Sequence) -> None:
        """Stop scheduling a sequence until `unpark`. It keeps its blocks until somebody needs them."""
        seq.is_held = True
        self._park(seq)

    def unpark(self, seq: Sequence) -> None:
        """Let a sequence go on, if it has credit."""
        seq.is_held = False
        self._resume(seq)

    def grant(self, seq: Sequence, credit: int) -> None:
        """Let a sequence have so many outputs in all; at that number it is parked."""
        seq.credit = credit
        self._resume(seq)

    def _park(self, seq: Sequence) -> None:
        if seq.status is Status.PARKED:
            return
        self._take_out(seq)
        seq.status = Status.PARKED
        seq.was_parked = True
        self.parked[seq.id] = seq
        self.blocks.withdraw(seq)
        if seq.block_table:
            self.idle_holders.setdefault(seq.id, seq)

    def _resume(self, seq: Sequence) -> None:
        """Let a parked sequence wait for its turn, by its order of acceptance."""
        if seq.status is Status.PARKED and seq.may_run:
            del self.parked[seq.id]
            seq.status = Status.WAITING
            insort(self.waiting, seq, key=_order)

    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        """End a sequence between steps; its terminal event goes out with the next step."""
        self.outputs.append(self._finish(seq, [], reason, now))

    def expire(self, now: float) -> None:
        """End every sequence whose deadline has come, and every lease."""
        self.blocks.end_leases(now)
        for seq in [s for s in self.live.values() if s.deadline is not None and s.deadline <= now]:
            self.finish(seq, "expired", now)

    # --- one step

    def schedule(self, now: float) -> StepPlan:
        """Decide on the next step. Grants blocks and preempts; nothing else changes until `update`."""
        self._now = now
        plan = _PlanBuilder(self.config.max_num_batched_tokens, self.config.max_logit_rows, now)
        longer: list[Sequence] = []
        for seq in tuple(self.running):
            if seq.status is not Status.RUNNING:
                continue  # preempted by one ahead of it
            missing = seq.num_to_compute - seq.num_computed
            if missing > 1:
                longer.append(seq)
            elif not missing:
                continue  # its last token is in flight
            elif self._grow(seq):
                plan.add(seq)
        for seq in longer:
            if seq.status is Status.RUNNING and plan.has_room:
                plan.add(seq)
        self._admit_waiting(plan, now)
        return plan.build(self.host.take_decided())

    def update(self, plan: StepPlan, results: Seq[Seq[LogitsResult] | None], now: float) -> list[SequenceOutput]:
        """Take in a step: one entry per planned sequence, its rows of logits in order, or None where it failed."""
        self.advance(plan)
        return self.settle(plan, results, now)

    def advance(self, plan: StepPlan) -> None:
        """Count a step's tokens as computed. Called when it is done, or, with a step in flight (`pipeline.py`), once
        it is queued: what it samples can then be computed next, unless it is known to be the last token."""
        row = 0
        for item in plan.sequences:
            seq = item.seq
            if seq.status is not Status.FINISHED:
                seq.num_computed += item.num_tokens
                is_last = len(seq.outputs) + 1 >= min(seq.max_tokens, seq.credit)
                seq.pending_row = row if item.num_logits and not seq.is_score and not is_last else -1
            row += item.num_logits

    def settle(self, plan: StepPlan, results: Seq[Seq[LogitsResult] | None], now: float) -> list[SequenceOutput]:
        """What an advanced step gave; see `update`. Sequences that have ended since then are passed over."""
        outputs: list[SequenceOutput] = []
        self._record(plan, now)
        for item, rows in zip(plan.sequences, results, strict=True):
            output = None if item.seq.status is Status.FINISHED else self._settle_one(item, rows, now)
            if output is not None:
                outputs.append(output)
        return outputs

    def _record(self, plan: StepPlan, now: float) -> None:
        """Note a step that is done, and which traced sequences were in it."""
        self.num_steps += 1
        begun = plan.started if self.last_step is None else max(plan.started, self.last_step.ended)
        self.estimates.add_step(plan.num_tokens, plan.num_logits, now - begun)
        traced = []
        for item in plan.sequences:
            timeline = item.seq.timeline
            if timeline is not None:
                traced.append(item.seq.id)
                if item.num_tokens > 1 or item.seq.first_token_at is None:
                    timeline.prefill(plan.started, now, item.num_tokens, self.num_steps)
        self.last_step = StepRecord(
            self.num_steps, plan.started, now, plan.num_tokens, len(plan.sequences), tuple(traced)
        )

    def _admit_waiting(self, plan: _PlanBuilder, now: float) -> None:
        while self.waiting and plan.has_room and len(self.running) < self.config.max_num_seqs:
            seq = self.queue.next(self.waiting, now, self.estimates)
            if not self._admit(seq):
                return
            self.waiting.remove(seq)
            self.idle_holders.pop(seq.id, None)
            seq.status = Status.RUNNING
            self.queue.admitted(seq)
            insort(self.running, seq, key=standing)
            self.blocks.announce(seq)
            if seq.first_scheduled_at is None:
                seq.first_scheduled_at = now
                self.estimates.add_start(len(seq.prompt), seq.num_computed)
                self.queue.charge_prompt(seq, len(seq.prompt) - seq.num_computed)
            elif seq.timeline is not None:
                seq.timeline.note("resumed", now)
            if seq.num_to_compute > seq.num_computed:  # else its last token is in flight
                plan.add(seq)

    def _admit(self, seq: Sequence) -> bool:
        """Grant a waiting sequence the blocks of all its tokens, with one to spare per running sequence (each will need
        one soon; admitting into the last blocks would only preempt somebody)."""
        headroom = len(self.running)
        while True:
            # Looked up again after every release. All logits of a text to score are wanted: nothing can be skipped.
            hit = NO_HIT if seq.is_score or seq.block_table else self.blocks.lookup(seq)
            if hit.is_pending and not seq.host_table:
                return False
            shortage = self.blocks.shortage(seq, hit) + headroom
            if shortage <= 0:
                break
            holders = [holder for holder in self.idle_holders.values() if holder is not seq]
            if not holders or shortage > sum(len(holder.block_table) for holder in holders):
                return False
            self._preempt(holders[0])
        self.blocks.allocate(seq, hit)
        self.host.bring_back(seq)
        if seq.first_scheduled_at is None and not seq.is_score:
            seq.num_cached_tokens = min(seq.num_computed, len(seq.prompt))
            if self.config.enable_prefix_cache:
                self.num_prefix_queries += len(seq.tokens)
                self.num_prefix_hits += seq.num_computed
        return True

    def _grow(self, seq: Sequence) -> bool:
        """Make sure that a running sequence's table covers all of its tokens, at the cost of those behind it."""
        if not seq.num_new_blocks(self.config.block_size):
            return True
        while self.blocks.shortage(seq, NO_HIT) > 0:
            victim = self._victim(seq)
            if victim is None:
                return False
            self._preempt(victim)
        self.blocks.allocate(seq, NO_HIT)
        return True

    def _victim(self, seq: Sequence) -> Sequence | None:
        for holder in self.idle_holders.values():
            return holder
        for other in reversed(self.running):
            if other is seq:
                return None
            if other.is_preemptible:
                return other
        return None

    def _preempt(self, seq: Sequence) -> None:
        """Take all blocks of a sequence; what it has delivered stays, its KV is kept elsewhere or computed again."""
        self.host.take(seq)
        self.blocks.release(seq)
        self.idle_holders.pop(seq.id, None)
        seq.progress_at_preemption = seq.progress
        if seq.timeline is not None:
            seq.timeline.note("preempted", self._now)
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            seq.status = Status.WAITING
            insort(self.waiting, seq, key=_order)
        self.num_preemptions += 1

    def _settle_one(self, item: ScheduledSequence, rows: Seq[LogitsResult] | None, now: float) -> SequenceOutput | None:
        seq = item.seq
        if rows is None:
            return self._finish(seq, [], "error", now, error="STEP_FAILED")
        if not all(row.is_finite for row in rows):
            self.blocks.forget(seq)  # its KV may hold NaN, which must not spread through the prefix cache
            return self._finish(seq, [], "error", now, error="NUMERIC")
        seq.pending_row = -1
        self.blocks.register_computed(seq)
        if not rows:
            return None
        if seq.first_token_at is None:
            seq.first_token_at = now
        wants_logprobs = seq.is_score or seq.sampling.num_logprobs >= 0
        tokens = [TokenOutput(row.token_id, row.logprob if wants_logprobs else None, row.top) for row in rows]
        if seq.is_score:
            seq.num_scored = seq.num_computed
            if seq.num_scored == seq.num_to_compute:
                return self._finish(seq, tokens, "length", now)
            return SequenceOutput(seq.id, tokens)
        return self._append(seq, tokens, now)

    def _append(self, seq: Sequence, tokens: list[TokenOutput], now: float) -> SequenceOutput:
        token_id = tokens[0].token_id
        may_stop = len(seq.outputs) >= seq.sampling.min_tokens
        seq.tokens.append(token_id)
        seq.outputs.append(token_id)
        self.queue.charge_output(seq)
        if not seq.block_table:  # preempted with this step in flight: the token was no progress since then
            seq.progress_at_preemption = seq.progress
        if may_stop and token_id in seq.sampling.stop_token_ids:
            return self._finish(seq, tokens, "stop", now, stop=token_id)
        if len(seq.outputs) >= seq.max_tokens:
            return self._finish(seq, tokens, "length", now)
        if len(seq.outputs) >= seq.credit:
            self._park(seq)
        return SequenceOutput(seq.id, tokens)

    def _finish(
        self,
        seq: Sequence,
        tokens: list[TokenOutput],
        reason: FinishReason,
        now: float,
        *,
        error: str | None = None,
        stop: int | None = None,
    ) -> SequenceOutput:
        """Free everything that a sequence owns and make its terminal event."""
        self._take_out(seq)
        if seq.conversation and reason != "error":
            self.blocks.pin(seq.conversation, seq, now + seq.lease)
        self.blocks.release(seq)
        self.host.drop(seq)
        self.idle_holders.pop(seq.id, None)
        del self.live[seq.id]
        seq.status = Status.FINISHED
        is_typical = not seq.is_score and not seq.was_parked and reason not in ("error", "expired")
        if seq.first_scheduled_at is not None and is_typical:
            self.estimates.add_end(now - seq.first_scheduled_at, len(seq.outputs), seq.max_tokens)
        return SequenceOutput(seq.id, tokens, seq.finish_output(reason, now, error=error, stop=stop))

    def _take_out(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
        elif seq.status is Status.WAITING:
            self.waiting.remove(seq)
        else:
            del self.parked[seq.id]


class _PlanBuilder:
    """Spends one step's tokens and rows of logits."""

    def __init__(self, num_tokens: int, num_logits: int, now: float) -> None:
        self._now = now
        self._tokens_left = self._max_tokens = num_tokens
        self._logits_left = self._max_logits = num_logits
        self._sequences: list[ScheduledSequence] = []

    @property
    def has_room(self) -> bool:
        return self._tokens_left > 0 and self._logits_left > 0

    def add(self, seq: Sequence) -> None:
        """Schedule as much of a sequence as fits; at least one token does, while there is room."""
        start = seq.num_computed
        num_tokens = min(seq.num_to_compute - start, self._tokens_left)
        if seq.is_score:  # positions scored before a preemption need no logits again
            num_tokens = min(num_tokens, max(seq.num_scored - start, 0) + self._logits_left)
            num_logits = min(num_tokens, max(start + num_tokens - seq.num_scored, 0))
        else:
            num_logits = int(start + num_tokens == seq.num_to_compute)
        self._sequences.append(ScheduledSequence(seq, start, num_tokens, num_logits))
        self._tokens_left -= num_tokens
        self._logits_left -= num_logits

    def build(self, swaps: tuple[Swap, ...]) -> StepPlan:
        num_tokens = self._max_tokens - self._tokens_left
        return StepPlan(tuple(self._sequences), num_tokens, self._max_logits - self._logits_left, swaps, self._now)


def _order(seq: Sequence) -> int:
    return seq.order
