"""What happened to one traced sequence, for the front end's spans. Written by the scheduler and the engine.

Only sequences whose request says `is_traced` have one; the others cost a comparison with None a step.
"""

from __future__ import annotations

from typing import Literal

from headrace.engine.types import TimelineEvent

# A sequence that is parked and resumed for every message would grow its terminal event without bound.
_MAX_EVENTS = 256


class Timeline:
    """Events in the order in which they came; the first 256 of them."""

    def __init__(self) -> None:
        self._events: list[TimelineEvent] = []

    def note(self, kind: Literal["preempted", "parked", "resumed"], at: float) -> None:
        """Something that has no duration. at: seconds of CLOCK_MONOTONIC."""
        self._add(TimelineEvent(kind, at))

    def prefill(self, started: float, ended: float, num_tokens: int, step: int) -> None:
        """A step (by its number) that computed several tokens of the sequence, or those before its first output."""
        self._add(TimelineEvent("prefill", started, ended, num_tokens, step))

    def events(self) -> tuple[TimelineEvent, ...]:
        """All of them."""
        return tuple(self._events)

    def _add(self, event: TimelineEvent) -> None:
        if len(self._events) < _MAX_EVENTS:
            self._events.append(event)
