"""OpenTelemetry traces: one span per RPC, as a child of the caller's.

`rpc.py` opens and ends the spans. opentelemetry-instrumentation-grpc is not used: it breaks streaming handlers that
write (health Watch among them) and records failures as status 0. Attribute names: OpenTelemetry's RPC conventions
(release candidate: rpc.method is the full name) and its GenAI ones. Prompts and answers are never recorded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider

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


def configure(service_version: str) -> TracerProvider | None:
    """Send spans over OTLP where OTEL_EXPORTER_OTLP_ENDPOINT says to; else do nothing. Once per process, by the CLI.

    The exporter drops spans when its queue is full or the collector is away; serving never waits for it.
    """
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return None
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "headrace", "service.version": service_version})
    provider = SdkTracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    use_provider(provider)
    return provider


def use_provider(provider: TracerProvider | None) -> None:
    """Make spans with this provider; None: with the process's global one."""
    global _provider
    _provider = provider


@contextmanager
def server_span(method: str, metadata: Sequence[tuple[str, str | bytes]], *, is_recorded: bool) -> Iterator[Span]:
    """The span of one RPC, a child of the traceparent in its metadata."""
    if not is_recorded:
        yield trace.INVALID_SPAN
        return
    carrier = {key: value for key, value in metadata if isinstance(value, str)}
    tracer = trace.get_tracer("headrace", tracer_provider=_provider)
    attributes = {"rpc.system.name": "grpc", "rpc.method": method}
    with tracer.start_as_current_span(
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
