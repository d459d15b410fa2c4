"""One step in flight: the next step is decided and queued while the device runs this one. Driven by `engine.Engine` for
executors that are `headrace.kernels.batch.PipelinedExecutor`s.

    plan n is queued      its tokens are counted as computed (`Scheduler.advance`), what it samples is "pending"
    plan n + 1 is decided from what is known, and queued: it names pending tokens by their row of step n's results
    step n is collected   its tokens are appended and sent (`Scheduler.settle`); who ends here has a row too many in
                          step n + 1, whose result is dropped

Blocks given back meanwhile may be handed out at once: the device runs steps in order, a new owner's writes come last.
Plans with texts to score are not overtaken: how far they are is not known in advance.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq

from headrace.engine.batch import BatchBuilder
from headrace.engine.scheduler import ScheduledSequence, Scheduler, StepPlan
from headrace.engine.swap import Swap
from headrace.engine.types import SequenceOutput
from headrace.kernels.batch import ExecutorLostError, PipelinedExecutor, RowResult

log = logging.getLogger(__name__)

StepResults = list[list[RowResult] | None]
Clock = Callable[[], float]
Execute = Callable[[Seq[ScheduledSequence]], StepResults]


class Pipeline:
    """Holds the plan of the step in flight."""

    def __init__(
        self,
        executor: PipelinedExecutor,
        batches: BatchBuilder,
        execute: Execute,
        swap: Callable[[Seq[Swap]], None],
    ) -> None:
        """execute: runs items at once and charges a failure to who caused it; for steps that cannot be queued. swap:
        queues copies of KV blocks."""
        self._executor = executor
        self._batches = batches
        self._execute = execute
        self._swap = swap
        self._plan: StepPlan | None = None
        self._must_execute = False  # the last plan could not be queued

    @property
    def is_under_way(self) -> bool:
        """Whether a step is in flight."""
        return self._plan is not None

    def step(self, scheduler: Scheduler, clock: Clock) -> list[SequenceOutput]:
        """Queue the next step, if there is one, and take in the one before it."""
        if self._must_execute:
            return self._run_now(scheduler, clock)
        outputs: list[SequenceOutput] = []
        if self._plan is not None and any(item.seq.is_score for item in self._plan.sequences):
            outputs += self._settle(scheduler, clock)
        plan = scheduler.schedule(clock())
        is_queued = self._submit(plan)
        outputs += self._settle(scheduler, clock)
        if is_queued:
            scheduler.advance(plan)
            self._plan = plan
        return outputs

    def _run_now(self, scheduler: Scheduler, clock: Clock) -> list[SequenceOutput]:
        """A step without another in flight, as for any executor."""
        self._must_execute = False
        plan = scheduler.schedule(clock())
        self._swap(plan.swaps)
        if not plan.sequences:
            return []
        return scheduler.update(plan, self._execute(plan.sequences), clock())

    def _submit(self, plan: StepPlan) -> bool:
        """Queue a step; False where there is none or it cannot be queued as it is."""
        self._swap(plan.swaps)
        if not plan.sequences:
            return False
        try:
            self._executor.submit(self._batches.build(plan.sequences))
        except ExecutorLostError:
            raise
        except Exception:
            log.exception("a step of %d sequences could not be queued", len(plan.sequences))
            self._must_execute = True  # next time, when no token is pending any more: that finds out who is to blame
            return False
        return True

    def _settle(self, scheduler: Scheduler, clock: Clock) -> list[SequenceOutput]:
        """Wait for the step in flight and act on it. A step that fails as a whole ends all of its sequences."""
        plan, self._plan = self._plan, None
        if plan is None:
            return []
        results: StepResults
        try:
            results = share_out(plan.sequences, self._executor.collect())
        except ExecutorLostError:
            raise
        except Exception:
            log.exception("a step of %d sequences failed", len(plan.sequences))
            results = [None] * len(plan.sequences)
        return scheduler.settle(plan, results, clock())


def share_out(items: Seq[ScheduledSequence], rows: list[RowResult]) -> StepResults:
    """The rows of logits of each item, in order. Raises RuntimeError where there are too few or too many."""
    if len(rows) != sum(item.num_logits for item in items):
        raise RuntimeError(f"the executor gave {len(rows)} results")
    results: StepResults = []
    begin = 0
    for item in items:
        results.append(rows[begin : begin + item.num_logits])
        begin += item.num_logits
    return results
