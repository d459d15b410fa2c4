"""Load reports: in the trailers of every call and as a stream, of a server that is busy, full or without an engine."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from headrace.server import descriptors, orca

from tests.server import scripted_engine
from tests.server.raw_http2 import RawStream
from tests.server.support import Bench, bench, drained, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

_POOL = descriptors.build_pool()
Report: Any = GetMessageClass(_POOL.FindMessageTypeByName("xds.data.orca.v3.OrcaLoadReport"))
Request: Any = GetMessageClass(_POOL.FindMessageTypeByName("xds.service.orca.v3.OrcaLoadReportRequest"))


async def _trailer(server: Bench, **sampling: Any) -> Any:
    """The report in the trailers of one call; gRPC's own clients keep it to themselves."""
    stream = RawStream(server.running.port, "Generate", tokens_request(**sampling).SerializeToString())
    await stream.open()
    try:
        trailers = await stream.read_to_end()
    finally:
        stream.abort()
    data = trailers["endpoint-load-metrics-bin"]
    return Report.FromString(base64.b64decode(data + "=" * (-len(data) % 4)))


def _stream(server: Bench, seconds: float) -> Any:
    request = Request()
    request.report_interval.FromMilliseconds(round(seconds * 1000))
    method = server.channel.unary_stream(
        f"/{orca.SERVICE}/StreamCoreMetrics",
        request_serializer=Request.SerializeToString,
        response_deserializer=Report.FromString,
    )
    return method(request)


async def test_every_call_ends_with_a_report(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command()) as server:  # one in which nothing has failed yet
        report = await _trailer(server, max_tokens=2)
    assert report.rps_fractional > 0
    assert 0 < report.application_utilization < 1
    assert 0 < report.mem_utilization < 1
    assert report.eps == 0
    names = {"queue_depth", "waiting_tokens", "kv_cache_use", "prefix_hit_share", "running"}
    assert set(report.named_metrics) == names


async def test_a_refusal_reports_too(counting: Bench) -> None:
    report = await _trailer(counting, top_p=7.0)
    assert report.rps_fractional > 0


async def test_the_stream_follows_the_load(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, max_num_seqs=2) as server:
        call = _stream(server, 0.1)
        idle = await call.read()
        assert idle.application_utilization == pytest.approx(0.001)
        calls = [server.stub.Generate(tokens_request([9] * 20, max_tokens=400)) for _ in range(4)]
        await until(lambda: server.running.admission.stats().num_queued == 2)
        reports = [await call.read() for _ in range(3)]
        assert reports[-1].application_utilization == pytest.approx(2.0)  # as many again wait
        assert reports[-1].named_metrics["queue_depth"] == 2
        assert reports[-1].named_metrics["waiting_tokens"] == 40
        assert reports[-1].named_metrics["kv_cache_use"] > 0
        for other in calls:
            other.cancel()
        await server.idle_stats()
        call.cancel()


async def test_a_full_cache_counts_although_few_run(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, num_blocks=33) as server:
        call = server.stub.Generate(tokens_request([9] * 450, max_tokens=40))
        await call.read()
        (report,) = [await _stream(server, 1).read()]
        assert report.application_utilization == pytest.approx(29 / 32, abs=0.04)
        call.cancel()
        await server.idle_stats()


async def test_faults_of_the_server_are_errors(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command()) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await drained(server.stub.Generate(tokens_request([scripted_engine.NAN])))
        report = await _stream(server, 1).read()
        assert report.eps == pytest.approx(report.rps_fractional, rel=0.05)
        assert report.eps > 0


async def test_without_an_engine_the_server_is_full(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command()) as server:
        calls = server.stub.Generate(tokens_request([scripted_engine.CRASH]))
        with pytest.raises(grpc.aio.AioRpcError):
            await drained(calls)
        report = await _stream(server, 1).read()
        assert report.application_utilization == 1.0
        await asyncio.wait_for(server.running.wait_ready(), 20)
