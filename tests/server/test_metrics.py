"""Metrics: the conventions' histograms with exemplars that lead to traces, the engine's counts, and a real scrape."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from headrace.server import exporters, metrics, telemetry
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.parser import text_string_to_metric_families

from tests.server import scripted_engine
from tests.server.support import Bench, bench, chat_prompt, drained, failure, tokens_request, until

MODEL = "gen_ai.request.model"

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    meters, tracers = MeterProvider([reader]), TracerProvider()
    metrics.install(meters)
    telemetry.use_provider(tracers)
    yield reader
    metrics.install(None)
    telemetry.use_provider(None)
    meters.shutdown()
    tracers.shutdown()


def points(reader: InMemoryMetricReader, name: str) -> list[Any]:
    data = reader.get_metrics_data()
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics] if data else []
    return [point for scope in scopes for m in scope.metrics if m.name == name for point in m.data.data_points]


async def test_a_generation_is_timed_by_the_conventions(counting: Bench, reader: InMemoryMetricReader) -> None:
    request = tokens_request(max_tokens=5)
    request.prompt.CopyFrom(chat_prompt("hello"))
    await drained(counting.stub.Generate(request))
    await until(lambda: bool(points(reader, "gen_ai.server.request.duration")))
    attributes = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "headrace",
        "gen_ai.request.model": "tiny",
    }
    for name in ("request.duration", "time_to_first_token", "time_per_output_token"):
        (point,) = points(reader, f"gen_ai.server.{name}")
        assert (point.count, dict(point.attributes)) == (1, attributes)
    (first,) = points(reader, "gen_ai.server.time_to_first_token")
    (whole,) = points(reader, "gen_ai.server.request.duration")
    assert 0 < first.sum <= whole.sum
    assert first.explicit_bounds[:3] == (0.001, 0.005, 0.01)
    tokens = {p.attributes["gen_ai.token.type"]: p.value for p in points(reader, "headrace.tokens")}
    assert tokens["output"] == 5
    assert tokens["input"] > 1


async def test_exemplars_lead_to_the_trace(counting: Bench, reader: InMemoryMetricReader) -> None:
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    metadata = (("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),)
    await drained(counting.stub.Generate(tokens_request(max_tokens=5), metadata=metadata))
    found: set[str] = set()

    def look() -> bool:  # a reading takes the exemplars with it
        data = reader.get_metrics_data()
        for scope in (scope for resource in data.resource_metrics for scope in resource.scope_metrics) if data else ():
            for metric in scope.metrics:
                exemplars = [e for point in metric.data.data_points for e in getattr(point, "exemplars", ())]
                found.update(metric.name for e in exemplars if format(e.trace_id, "032x") == trace_id)
        return {"gen_ai.server.time_to_first_token", "rpc.server.call.duration"} <= found

    await until(look)


async def test_failures_are_told_apart(counting: Bench, reader: InMemoryMetricReader) -> None:
    await failure(drained(counting.stub.Generate(tokens_request(top_p=9.0))))
    await failure(drained(counting.stub.Generate(tokens_request([scripted_engine.NAN]))))

    def calls() -> dict[Any, int]:
        return {p.attributes.get("error.type"): p.count for p in points(reader, "rpc.server.call.duration")}

    await until(lambda: calls() == {"INVALID_REQUEST": 1, "NUMERIC": 1})
    (point,) = points(reader, "gen_ai.server.request.duration")
    assert point.attributes["error.type"] == "NUMERIC"
    assert not points(reader, "gen_ai.server.time_to_first_token")


async def test_steps_and_refusals_are_counted(tiny_llama_gguf: Any, reader: InMemoryMetricReader) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), max_live_sequences=1, model_name="small") as server:
        await failure(drained(server.stub.Generate(tokens_request(n=2))))  # larger than the server: not a shed
        call = server.stub.Generate(tokens_request(max_tokens=500))
        await call.read()
        await failure(drained(server.stub.Generate(tokens_request())))
        call.cancel()
        await server.idle_stats()
        sheds = {p.attributes["reason"]: p.value for p in points(reader, "headrace.sheds")}
        assert sheds == {"OVERLOADED": 1}
        (steps,) = [p for p in points(reader, "headrace.engine.steps") if p.attributes[MODEL] == "small"]
        (timed,) = [p for p in points(reader, "headrace.engine.step.duration") if p.attributes[MODEL] == "small"]
        assert timed.count == steps.value > 0
        states = {
            p.attributes["state"] for p in points(reader, "headrace.engine.sequences") if p.attributes[MODEL] == "small"
        }
        assert states == {"running", "waiting", "parked"}


async def test_prometheus_scrapes(counting: Bench) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = exporters.start("1", traces=False, otlp_metrics=False, host="127.0.0.1", port=port)
    try:
        await drained(counting.stub.Generate(tokens_request(max_tokens=5)))
        page = _scrape(port)
        await until(lambda: "gen_ai_server_request_duration_seconds_count" in _scrape(port))
    finally:
        stop()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    running = families["headrace_engine_sequences"].samples[0]
    assert running.labels == {"gen_ai_request_model": "tiny", "state": "running"}
    blocks = {sample.labels["state"]: sample.value for sample in families["headrace_engine_kv_blocks"].samples}
    assert set(blocks) == {"used", "pinned", "cached", "free"}
    assert min(blocks.values()) >= 0
    assert sum(blocks.values()) == (await counting.stats()).num_total_blocks
    with pytest.raises(OSError, match=r"refused"):
        _scrape(port)


def _scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return str(answer.read().decode())
