"""The engine's own classes with eyes in them, for the state machine (machine.py)."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine, StepResults
from headrace.engine.scheduler import ScheduledSequence, Scheduler
from headrace.engine.sequence import Sequence, Status


class WatchedScheduler(Scheduler):
    """Asserts invariant 9: no running sequence loses its blocks twice without having delivered something."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.progress_marks: dict[int, int] = {}

    def _preempt(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            assert seq.progress > self.progress_marks.get(seq.order, -1), "9: preempted twice without progress"
            self.progress_marks[seq.order] = seq.progress
        super()._preempt(seq)


class WatchedEngine(Engine):
    """Remembers what the last step planned."""

    planned: tuple[ScheduledSequence, ...] = ()

    def _execute(self, items: Seq[ScheduledSequence]) -> StepResults:
        self.planned = self.planned or tuple(items)  # the first call of a step has all of them
        return super()._execute(items)
