"""OpenTelemetry metrics: how long requests take, by the GenAI and RPC conventions, and what the engine is at.

`telemetry.configure` installs them where somebody collects: OTLP, or a Prometheus server that scrapes. Until then every
function here returns at once. Histograms are recorded in the context of the request's span, so that their exemplars
lead to its trace. The engine's counts are read when they are collected, from its last step; nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from headrace.engine.types import EngineStats, FinishOutput, StepRecord
from headrace.server.errors import ErrorKind
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation

if TYPE_CHECKING:
    from headrace.server.telemetry import Work

Attributes = Mapping[str, str | int]

# Bucket bounds in seconds, as the conventions give them (opentelemetry.io/docs/specs/semconv: gen-ai, rpc).
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_CALL = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
# Ours: a step of a small model on a CPU takes 1 ms, one of 8,192 prompt tokens seconds.
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_STEP_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)

# Gauges and counters over EngineStats: instrument, unit, what it says, and (state, field) or ("", field).
_GAUGES = (
    (
        "headrace.engine.sequences",
        "{sequence}",
        "Sequences in the engine by state.",
        (("running", "num_running"), ("waiting", "num_waiting"), ("parked", "num_parked")),
    ),
    ("headrace.engine.host_kv_blocks", "{block}", "KV blocks of the host pool.", (("", "num_host_blocks"),)),
)
_COUNTERS = (
    ("headrace.engine.steps", "{step}", "Steps run.", "num_steps"),
    ("headrace.engine.step_failures", "{step}", "Steps in which the executor failed.", "num_step_failures"),
    ("headrace.engine.preemptions", "{preemption}", "Sequences that lost their KV blocks.", "num_preemptions"),
    ("headrace.engine.swaps", "{preemption}", "Preemptions that kept the KV in host memory.", "num_swapped_out"),
    (
        "headrace.engine.pins_lost",
        "{conversation}",
        "Conversations whose KV was needed before its lease ended.",
        "num_pins_lost",
    ),
    ("headrace.prefix_cache.queries", "{token}", "Prompt tokens looked up in the prefix cache.", "num_prefix_queries"),
    ("headrace.prefix_cache.hits", "{token}", "Prompt tokens found in the prefix cache.", "num_prefix_hits"),
)

_metrics: Metrics | None = None
_sources: list[Source] = []


@dataclass(frozen=True)
class Source:
    """A running server, as the collecting side reads it."""

    model: str
    engine: Callable[[], EngineStats | None]
    num_restarts: Callable[[], int]


class Metrics:
    """The instruments on one provider."""

    def __init__(self, provider: MeterProvider) -> None:
        meter = provider.get_meter("headrace")
        seconds = {"unit": "s"}
        self.call = meter.create_histogram(
            "rpc.server.call.duration",
            **seconds,
            description="Duration of RPCs.",
            explicit_bucket_boundaries_advisory=_CALL,
        )
        self.duration = meter.create_histogram(
            "gen_ai.server.request.duration",
            **seconds,
            description="From a request's arrival to its last token.",
            explicit_bucket_boundaries_advisory=_DURATION,
        )
        self.first_token = meter.create_histogram(
            "gen_ai.server.time_to_first_token",
            **seconds,
            description="From a request's arrival to its first token.",
            explicit_bucket_boundaries_advisory=_FIRST_TOKEN,
        )
        self.per_token = meter.create_histogram(
            "gen_ai.server.time_per_output_token",
            **seconds,
            description="Mean time between the tokens of a request after the first.",
            explicit_bucket_boundaries_advisory=_PER_TOKEN,
        )
        self.step = meter.create_histogram(
            "headrace.engine.step.duration",
            **seconds,
            description="Duration of engine steps.",
            explicit_bucket_boundaries_advisory=_STEP,
        )
        self.step_tokens = meter.create_histogram(
            "headrace.engine.step.tokens",
            unit="{token}",
            description="Tokens computed in a step.",
            explicit_bucket_boundaries_advisory=_STEP_TOKENS,
        )
        self.tokens = meter.create_counter(
            "headrace.tokens", unit="{token}", description="Tokens of ended generations, by type."
        )
        self.sheds = meter.create_counter(
            "headrace.sheds", unit="{request}", description="Requests refused because of load, by reason."
        )
        _observe_engines(meter)


def install(provider: MeterProvider | None) -> None:
    """Record on this provider from now on; None: nowhere."""
    global _metrics
    _metrics = Metrics(provider) if provider is not None else None


def is_enabled() -> bool:
    """Whether anybody collects."""
    return _metrics is not None


def watch(source: Source) -> Callable[[], None]:
    """Let a server's engine be read; returns what ends that."""
    _sources.append(source)
    return lambda: _sources.remove(source)


def call_ended(method: str, status: str, reason: str, seconds: float) -> None:
    """An RPC has ended. Called inside its span."""
    if _metrics is None:
        return
    attributes = {"rpc.system.name": "grpc", "rpc.method": method, "rpc.response.status_code": status}
    if status != "OK":
        attributes["error.type"] = reason or status
    _metrics.call.record(seconds, attributes)


def refused(kind: ErrorKind) -> None:
    """A request ends with this error; counted where it was refused because of load."""
    if _metrics is not None and kind.is_retryable and kind.code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        _metrics.sheds.add(1, {"reason": kind.reason})


def generation_ended(work: Work, finish: FinishOutput, seconds: float) -> None:
    """A sequence has ended, `seconds` after its request arrived."""
    if _metrics is None:
        return
    attributes: dict[str, str] = {
        "gen_ai.operation.name": work.operation,
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": work.model,
    }
    context: Context = work.context
    tokens = finish.num_output_tokens
    _metrics.tokens.add(finish.num_prompt_tokens, {**attributes, "gen_ai.token.type": "input"}, context)
    _metrics.tokens.add(tokens, {**attributes, "gen_ai.token.type": "output"}, context)
    if tokens:
        lead = seconds - finish.queue_seconds - finish.prefill_seconds - finish.decode_seconds
        first = max(0.0, lead) + finish.queue_seconds + finish.prefill_seconds
        _metrics.first_token.record(first, attributes, context)
    if tokens > 1:
        _metrics.per_token.record(finish.decode_seconds / (tokens - 1), attributes, context)
    if finish.reason in ("error", "expired", "cancelled"):
        attributes["error.type"] = finish.error or finish.reason
    _metrics.duration.record(seconds, attributes, context)


def step_ended(model: str, record: StepRecord) -> None:
    """A step is done."""
    if _metrics is None:
        return
    attributes = {"gen_ai.request.model": model}
    _metrics.step.record(record.ended - record.started, attributes)
    _metrics.step_tokens.record(record.num_tokens, attributes)


def _observe_engines(meter: Meter) -> None:
    for name, unit, description, states in _GAUGES:
        meter.create_observable_gauge(name, [_gauge(states)], unit, description)
    meter.create_observable_gauge("headrace.engine.kv_blocks", [_blocks], "{block}", "KV blocks of the pool by state.")
    for name, unit, description, field in _COUNTERS:
        meter.create_observable_counter(name, [_counter(field)], unit, description)
    meter.create_observable_counter(
        "headrace.engine.restarts", [_restarts], "{restart}", "Engines started because the one before died."
    )


def _each() -> Iterable[tuple[dict[str, str], EngineStats]]:
    for source in _sources:
        stats = source.engine()
        if stats is not None:
            yield {"gen_ai.request.model": source.model}, stats


def _gauge(states: tuple[tuple[str, str], ...]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_: CallbackOptions) -> Iterable[Observation]:
        for attributes, stats in _each():
            for state, field in states:
                more = {"state": state} if state else {}
                yield Observation(getattr(stats, field), {**attributes, **more})

    return read


def _counter(field: str) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def read(_: CallbackOptions) -> Iterable[Observation]:
        for attributes, stats in _each():
            yield Observation(getattr(stats, field), attributes)

    return read


def _blocks(_: CallbackOptions) -> Iterable[Observation]:
    """used: of sequences; pinned: of conversations; cached: of the prefix cache alone; free: of nobody."""
    for attributes, stats in _each():
        counts = {
            "used": stats.num_total_blocks - stats.num_free_blocks,
            "pinned": stats.num_pinned_blocks,
            "cached": stats.num_cached_blocks,
            "free": stats.num_free_blocks - stats.num_pinned_blocks - stats.num_cached_blocks,
        }
        for state, count in counts.items():
            yield Observation(count, {**attributes, "state": state})


def _restarts(_: CallbackOptions) -> Iterable[Observation]:
    for source in _sources:
        yield Observation(source.num_restarts(), {"gen_ai.request.model": source.model})
