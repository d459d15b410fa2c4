"""OpenTelemetry: set up once by the CLI; one span per RPC, as a child of the caller's, and what hangs below it.

`rpc.py` opens and ends the RPC's span, `prompts.py` and `generation.py` add theirs, `spans.py` what the engine did, and
`metrics.py` counts. opentelemetry-instrumentation-grpc is not used: it breaks streaming handlers that
write (health Watch among them) and records failures as status 0. Attribute names: OpenTelemetry's RPC conventions
(release candidate: rpc.method is the full name) and its GenAI ones. Prompts and answers are never recorded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from headrace.server import metrics
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider

# Statuses that are the server's fault (OpenTelemetry RPC conventions); the others leave the span's status unset.
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
# What servicers put into Call.facts, and the attribute that says it.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "operation": "gen_ai.operation.name",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
    "max_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "n": "gen_ai.request.choice.count",
    "finish": "gen_ai.response.finish_reasons",
}

_provider: TracerProvider | None = None  # None: the process's global one


def _is_exported(signal: str) -> bool:
    """Whether the environment names a collector for TRACES or METRICS."""
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return any(os.environ.get(name) for name in endpoints) and os.environ.get(f"OTEL_{signal}_EXPORTER") != "none"


@dataclass(frozen=True)
class Work:
    """A request on its way through the server, for its spans and metrics. began: CLOCK_MONOTONIC seconds."""

    operation: str  # "chat", "text_completion" or "score"
    model: str
    began: float
    context: Context


_begun: ContextVar[tuple[str, float]] = ContextVar("headrace_begun")


class Clock:
    """Turns CLOCK_MONOTONIC seconds into the nanoseconds since 1970 of spans, with one reading of both clocks."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, seconds: float) -> int:
        """The time of a span's start, end or event."""
        return self._offset + round(seconds * 1e9)


def configure(service_version: str, metrics_host: str = "", metrics_port: int = 0) -> Callable[[], None]:
    """Send spans and metrics over OTLP where OTEL_EXPORTER_OTLP_ENDPOINT says to (OTEL_TRACES_EXPORTER or
    OTEL_METRICS_EXPORTER "none" leaves one out), and let Prometheus scrape metrics_port unless that is 0. Once per
    process, by the CLI; returns what sends the rest and stops. Raises OSError where the port cannot be had.

    The exporters drop what they cannot send; serving never waits for a collector.
    """
    sends_traces, sends_metrics = _is_exported("TRACES"), _is_exported("METRICS")
    if not (sends_traces or sends_metrics or metrics_port):
        return lambda: None
    from headrace.server import exporters

    return exporters.start(
        service_version, traces=sends_traces, otlp_metrics=sends_metrics, host=metrics_host, port=metrics_port
    )


def use_provider(provider: TracerProvider | None) -> None:
    """Make spans with this provider; None: with the process's global one."""
    global _provider
    _provider = provider


def tracer() -> Tracer:
    """Of the provider in use."""
    return trace.get_tracer("headrace", tracer_provider=_provider)


def begin(operation: str) -> None:
    """The current task begins to prepare a prompt for generations of this operation: their times count from here."""
    _begun.set((operation, time.monotonic()))


def current_work(model: str) -> Work | None:
    """What the current task's generations belong to; None where nobody wants to know."""
    if not (metrics.is_enabled() or trace.get_current_span().is_recording()):
        return None
    operation, began = _begun.get(("text_completion", time.monotonic()))
    return Work(operation, model, began, otel_context.get_current())


@contextmanager
def child_span(name: str) -> Iterator[Span]:
    """A span below the current one, where that is recorded."""
    if not trace.get_current_span().is_recording():
        yield trace.INVALID_SPAN
        return
    with tracer().start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        yield span


def detokenized(context: Context | None, started: float, busy_seconds: float) -> None:
    """A generation's tokens have become text: a span from the first (CLOCK_MONOTONIC seconds) to now, which says how
    much of that was work."""
    if context is not None and trace.get_current_span(context).is_recording():
        begin_at = Clock().nanoseconds(started)
        span = tracer().start_span("detokenize", context=context, start_time=begin_at)
        span.set_attribute("headrace.busy_seconds", busy_seconds)
        span.end()


@contextmanager
def server_span(method: str, metadata: Sequence[tuple[str, str | bytes]], *, is_recorded: bool) -> Iterator[Span]:
    """The span of one RPC, a child of the traceparent in its metadata."""
    if not is_recorded:
        yield trace.INVALID_SPAN
        return
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    attributes = {"rpc.system.name": "grpc", "rpc.method": method}
    with tracer().start_as_current_span(
        method,
        context=propagate.extract(carrier),
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def end_server_span(span: Span, facts: Mapping[str, str | int | float | bool], status: str, reason: str) -> None:
    """Write what is known at the end of the RPC. status: the gRPC code's name."""
    if not span.is_recording():
        return
    if "operation" in facts:
        span.update_name(f"{facts['operation']} {facts.get('model', '')}".strip())
        span.set_attribute("gen_ai.provider.name", "headrace")
    for key, attribute in _ATTRIBUTES.items():
        if key in facts:
            value = facts[key]
            span.set_attribute(attribute, [str(value)] if key == "finish" else value)
    span.set_attribute("rpc.response.status_code", status)
    if status != "OK":
        span.set_attribute("error.type", reason or status)
    if status in _SERVER_FAULTS:
        span.set_status(Status(StatusCode.ERROR))
