"""Spans of what happens to a request inside: queue, prefill chunks, decode, and the steps that it shared.

`engine_client` tells an `Observer` what was submitted, what each step did and how each sequence ended. Spans of a
sequence are written when it has ended, from the timeline that the engine kept of it, under the span of its RPC. A step
belongs to everybody in it, so its span is a trace of its own, linked both ways; some are kept (`_is_kept`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec
from headrace.engine.types import FinishOutput, SequenceRequest, StepRecord, TimelineEvent
from headrace.server import metrics, telemetry
from headrace.server.telemetry import Work
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, SpanContext, Tracer

_STEP_INTERVAL = 64  # every so many steps with traced sequences in them have a span
_MAX_LINKS = 128  # of a sequence to steps; OpenTelemetry's own limit


@dataclass
class Watched:
    """A sequence in the engine. steps: spans of steps that it was in, by number."""

    work: Work
    submitted: float  # CLOCK_MONOTONIC seconds
    is_traced: bool
    num_held: int  # outputs that were generated elsewhere
    steps: dict[int, SpanContext] = field(default_factory=dict)


class Observer:
    """Follows the sequences of one engine client."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._watched: dict[int, Watched] = {}

    def submitted(self, request: SequenceRequest) -> Context | None:
        """A sequence goes to the engine. Returns where its spans belong; None where it is not traced, and its timeline
        not wanted."""
        work = telemetry.current_work(self._model)
        if work is None:
            return None
        is_traced = trace.get_current_span(work.context).is_recording()
        self._watched[request.id] = Watched(work, request.arrival, is_traced, len(request.held))
        return work.context if is_traced else None

    def stepped(self, record: StepRecord) -> None:
        """A step is done; what it finished is told afterwards."""
        metrics.step_ended(self._model, record)
        members = [watched for i in record.traced if (watched := self._watched.get(i)) is not None]
        if members and _is_kept(record, members):
            context = _step_span(record, members)
            for watched in members:
                if len(watched.steps) < _MAX_LINKS:
                    watched.steps[record.number] = context

    def finished(self, sequence_id: int, finish: FinishOutput | None) -> None:
        """A sequence has ended; None: the engine is gone, or refused it."""
        watched = self._watched.pop(sequence_id, None)
        if watched is None or finish is None:
            return
        if watched.num_held:
            num_outputs = max(0, finish.num_output_tokens - watched.num_held)
            finish = msgspec.structs.replace(finish, num_output_tokens=num_outputs)
        metrics.generation_ended(watched.work, finish, time.monotonic() - watched.work.began)
        if watched.is_traced:
            _sequence_spans(watched, finish)


def _is_kept(record: StepRecord, members: list[Watched]) -> bool:
    """The first step of each sequence, and one now and then."""
    return record.number % _STEP_INTERVAL == 0 or any(not watched.steps for watched in members)


def _step_span(record: StepRecord, members: list[Watched]) -> SpanContext:
    clock = telemetry.Clock()
    span = telemetry.tracer().start_span(
        "engine.step",
        context=Context(),
        start_time=clock.nanoseconds(record.started),
        links=[Link(trace.get_current_span(watched.work.context).get_span_context()) for watched in members],
        attributes={
            "headrace.step.number": record.number,
            "headrace.step.tokens": record.num_tokens,
            "headrace.step.sequences": record.num_sequences,
        },
    )
    span.end(clock.nanoseconds(record.ended))
    return span.get_span_context()


def _sequence_spans(watched: Watched, finish: FinishOutput) -> None:
    tracer, clock, parent = telemetry.tracer(), telemetry.Clock(), watched.work.context
    scheduled = watched.submitted + finish.queue_seconds
    _span(tracer, "queue", parent, clock.nanoseconds(watched.submitted), clock.nanoseconds(scheduled))
    prefills = [event for event in finish.timeline if event.kind == "prefill"]
    for event in prefills:
        links = [Link(watched.steps[event.step])] if event.step in watched.steps else []
        attributes = {"headrace.tokens": event.num_tokens, "headrace.step.number": event.step}
        times = clock.nanoseconds(event.at), clock.nanoseconds(event.until)
        _span(tracer, "prefill", parent, *times, links, attributes)
    if finish.num_output_tokens:
        first = scheduled + finish.prefill_seconds
        shown = {event.step for event in prefills}
        links = [Link(context) for number, context in watched.steps.items() if number not in shown]
        _decode_span(tracer, parent, clock, first, finish, links)


def _decode_span(
    tracer: Tracer, parent: Context, clock: telemetry.Clock, first: float, finish: FinishOutput, links: list[Link]
) -> None:
    """From the first token to the last, with what interrupted it as events."""
    span = tracer.start_span(
        "decode",
        context=parent,
        start_time=clock.nanoseconds(first),
        links=links,
        attributes={"headrace.tokens": finish.num_output_tokens, "headrace.finish.reason": finish.reason},
    )
    span.add_event("first_token", timestamp=clock.nanoseconds(first))
    for event in _interruptions(finish.timeline):
        span.add_event(event.kind, timestamp=clock.nanoseconds(event.at))
    span.end(clock.nanoseconds(first + finish.decode_seconds))


def _interruptions(timeline: tuple[TimelineEvent, ...]) -> list[TimelineEvent]:
    return [event for event in timeline if event.kind != "prefill"]


def _span(
    tracer: Tracer,
    name: str,
    parent: Context,
    started: int,
    ended: int,
    links: list[Link] | None = None,
    attributes: dict[str, int] | None = None,
) -> None:
    tracer.start_span(name, context=parent, start_time=started, links=links, attributes=attributes).end(ended)
