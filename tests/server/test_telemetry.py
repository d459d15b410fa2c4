"""Traces: one span per RPC under the caller's, named and attributed by the conventions, without content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.server import telemetry
from headrace.v1 import inference_pb2 as pb
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.server import scripted_engine
from tests.server.support import Bench, chat_prompt, drained, failure, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    telemetry.use_provider(provider)
    yield exporter
    telemetry.use_provider(None)
    provider.shutdown()


def _named(spans: InMemorySpanExporter, name: str) -> list[Any]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def _span(spans: InMemorySpanExporter) -> Any:
    """The span of the RPC."""

    def servers() -> list[Any]:
        return [span for span in spans.get_finished_spans() if span.kind == SpanKind.SERVER]

    await until(lambda: len(servers()) == 1)
    (span,) = servers()
    spans.clear()
    return span


async def test_a_call_is_a_span_under_its_callers(counting: Bench, spans: InMemorySpanExporter) -> None:
    request = tokens_request(max_tokens=4)
    request.prompt.CopyFrom(chat_prompt("CANARY prompt"))
    metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-01"), ("tracestate", ""))
    await drained(counting.stub.Generate(request, metadata=metadata))
    span = await _span(spans)
    assert format(span.context.trace_id, "032x") == TRACE_ID
    assert format(span.parent.span_id, "016x") == PARENT_ID
    assert (span.kind, span.name) == (SpanKind.SERVER, "chat tiny")
    assert span.status.status_code == StatusCode.UNSET
    attributes = dict(span.attributes)
    assert attributes["rpc.method"] == "headrace.v1.InferenceService/Generate"
    assert attributes["rpc.system.name"] == "grpc"
    assert attributes["rpc.response.status_code"] == "OK"
    assert attributes["gen_ai.request.model"] == "tiny"
    assert attributes["gen_ai.request.max_tokens"] == 4
    assert attributes["gen_ai.usage.output_tokens"] == 4
    assert attributes["gen_ai.usage.input_tokens"] > 5
    assert attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert "CANARY" not in span.to_json()


async def test_the_callers_fault_is_no_error_of_the_server(counting: Bench, spans: InMemorySpanExporter) -> None:
    await failure(drained(counting.stub.Generate(tokens_request(top_p=9.0))))
    span = await _span(spans)
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    assert span.attributes["error.type"] == "INVALID_REQUEST"
    assert span.status.status_code == StatusCode.UNSET
    await failure(drained(counting.stub.Generate(tokens_request([scripted_engine.NAN]))))
    span = await _span(spans)
    assert (span.attributes["error.type"], span.status.status_code) == ("NUMERIC", StatusCode.ERROR)


async def test_a_cancelled_call_says_so(counting: Bench, spans: InMemorySpanExporter) -> None:
    call = counting.stub.Session()  # busy: an idle one may look half-closed before it looks cancelled
    start = pb.SessionStart(generation_id="g", request=tokens_request(max_tokens=500))
    await call.write(pb.SessionRequest(start=start))
    await call.read()
    call.cancel()
    assert (await _span(spans)).attributes["rpc.response.status_code"] == "CANCELLED"


async def test_probes_leave_no_spans(counting: Bench, spans: InMemorySpanExporter) -> None:
    stub: Any = health_pb2_grpc.HealthStub(counting.channel)
    await stub.Check(health_pb2.HealthCheckRequest())
    await drained(counting.stub.Generate(tokens_request()))
    assert (await _span(spans)).name == "text_completion tiny"


async def test_what_happened_inside_hangs_below_the_call(counting: Bench, spans: InMemorySpanExporter) -> None:
    """Queue, prefill and decode follow one another; the steps of it are traces of their own, linked both ways."""
    await drained(counting.stub.Generate(tokens_request(range(3, 200), max_tokens=6)))
    await until(lambda: bool(_named(spans, "decode") and _named(spans, "text_completion tiny")))
    (call,) = _named(spans, "text_completion tiny")
    parts = [_named(spans, name) for name in ("queue", "prefill", "decode", "detokenize")]
    (queue,), prefills, (decode,), (detokenize,) = parts
    for part in (queue, *prefills, decode, detokenize):
        assert part.parent.span_id == call.context.span_id
        assert call.start_time <= part.start_time <= part.end_time
    assert sum(part.attributes["headrace.tokens"] for part in prefills) == 197
    assert abs(queue.end_time - prefills[0].start_time) < 1e9
    assert prefills[-1].end_time == pytest.approx(decode.start_time, abs=1000)
    assert [event.name for event in decode.events] == ["first_token"]
    assert decode.attributes["headrace.tokens"] == 6
    steps = {span.context.span_id: span for span in _named(spans, "engine.step")}
    (link,) = prefills[0].links
    step = steps[link.context.span_id]
    assert step.parent is None
    assert [shared.context.span_id for shared in step.links] == [call.context.span_id]
    assert step.attributes["headrace.step.tokens"] == prefills[0].attributes["headrace.tokens"]


async def test_two_in_one_step_are_both_linked(counting: Bench, spans: InMemorySpanExporter) -> None:
    await drained(counting.stub.Generate(tokens_request(n=2, max_tokens=6)))
    await until(lambda: len(_named(spans, "decode")) == 2)
    assert any(
        len(step.links) == 2 and step.attributes["headrace.step.sequences"] == 2
        for step in _named(spans, "engine.step")
    )


async def test_a_prompt_of_text_has_a_span_for_its_tokens(counting: Bench, spans: InMemorySpanExporter) -> None:
    request = tokens_request(max_tokens=1)
    request.prompt.CopyFrom(chat_prompt("CANARY"))
    await drained(counting.stub.Generate(request))
    await until(lambda: bool(_named(spans, "chat tiny")))
    assert _named(spans, "tokenize")[0].parent.span_id == _named(spans, "chat tiny")[0].context.span_id
    assert not any("CANARY" in span.to_json() for span in spans.get_finished_spans())


async def test_a_caller_who_does_not_sample_gets_no_spans(counting: Bench, spans: InMemorySpanExporter) -> None:
    metadata = (("traceparent", f"00-{TRACE_ID}-{PARENT_ID}-00"),)
    await drained(counting.stub.Generate(tokens_request(), metadata=metadata))
    await drained(counting.stub.Generate(tokens_request(max_tokens=3)))
    assert (await _span(spans)).attributes["gen_ai.request.max_tokens"] == 3
