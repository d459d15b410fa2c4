"""Cancellation, deadlines and readers that do not read: what runs for nobody stops, and nobody else notices."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.raw_http2 import RawStream
from tests.server.support import Bench, bench, drained, failure, ids_of, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_a_cancelled_call_frees_its_blocks_within_a_step(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02)) as server:
        call = server.stub.Generate(tokens_request([9] * 100, max_tokens=400))
        await call.read()
        stats = await server.stats()
        assert stats.num_free_blocks < stats.num_total_blocks
        call.cancel()
        await until(lambda: server.running.admission.stats().num_live == 0)  # the front end knows
        steps = (await server.stats()).num_steps  # sent after the cancel, so answered after it too
        stats = await server.stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        assert stats.num_running == 0
        assert stats.num_steps <= steps + 1
        with pytest.raises(asyncio.CancelledError):
            await call.read()


async def test_cancelling_a_waiting_unary_call_stops_its_generations(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02)) as server:
        call = server.stub.Complete(pb.CompleteRequest(request=tokens_request(max_tokens=400, n=4, temperature=1.0)))
        await until(lambda: server.running.admission.stats().num_sequences == 4)
        call.cancel()
        stats = await server.idle_stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        assert stats.num_steps < 200


async def test_a_client_that_dies_frees_its_blocks(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02)) as server:
        stream = RawStream(server.running.port, "Generate", tokens_request(max_tokens=400).SerializeToString())
        await stream.open()
        await until(lambda: server.running.admission.stats().num_live == 1)
        stream.abort()
        stats = await server.idle_stats()
        assert stats.num_steps < 200


async def test_the_clients_deadline_stops_the_work(tiny_llama_gguf: Path) -> None:
    """The client's own clock says DEADLINE_EXCEEDED; the engine stops by its own, whatever the front end does."""
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02)) as server:
        failed = await failure(drained(server.stub.Generate(tokens_request(max_tokens=400), timeout=0.3)))
        assert failed.code == grpc.StatusCode.DEADLINE_EXCEEDED
        assert failed.reason == ""  # not from the server: that would eject a healthy host from a mesh
        stats = await server.idle_stats()
        assert stats.num_steps < 200
        assert stats.num_free_blocks == stats.num_total_blocks


async def test_work_that_has_expired_is_never_scheduled(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.1), max_num_seqs=1) as server:
        first = server.stub.Generate(tokens_request([200], max_tokens=8))
        await first.initial_metadata()
        # Behind the first one until their time is up; admitted, as nobody knows yet how long a step takes.
        calls = [server.stub.Generate(tokens_request(max_tokens=8), timeout=0.05) for _ in range(3)]
        for failed in await asyncio.gather(*(failure(drained(call)) for call in calls)):
            assert failed.code == grpc.StatusCode.DEADLINE_EXCEEDED
        while await first.read() is not grpc.aio.EOF:
            pass
        assert (await server.idle_stats()).num_steps == 8


async def test_a_call_without_a_deadline_gets_the_servers(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, default_deadline=0.3, max_deadline=0.4) as server:
        # Without one, the default; with a longer one, the server's most.
        for timeout in (None, 30.0):
            call = server.stub.Generate(tokens_request(max_tokens=400), timeout=timeout)
            responses: list[pb.GenerateResponse] = []

            async def collect(call: Any = call, responses: Any = responses) -> None:
                async for response in call:
                    responses.append(response)

            failed = await failure(collect())
            assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TIME_LIMIT")
            assert len(ids_of(responses)) > 2
        failed = await failure(server.stub.Complete(pb.CompleteRequest(request=tokens_request(max_tokens=400))))
        assert failed.reason == "TIME_LIMIT"
        assert (await server.idle_stats()).num_steps < 200


async def test_a_reader_that_does_not_read_is_parked_then_cut_off_and_nobody_else_notices(
    tiny_llama_gguf: Path,
) -> None:
    settings: dict[str, Any] = {"stream_buffer_tokens": 16, "stall_timeout": 0.6}
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.001), **settings) as server:
        process = psutil.Process()
        await drained(server.stub.Generate(tokens_request(max_tokens=300)))
        before = process.memory_info().rss
        raw = tokens_request(max_tokens=480).SerializeToString()
        streams = [RawStream(server.running.port, "Generate", raw, window=100) for _ in range(50)]
        for stream in streams:
            await stream.open()
        await until(lambda: _parked(server, 50))
        parked = await server.stats()
        # A good reader's stream goes on beside 50 parked ones.
        responses = await drained(server.stub.Generate(tokens_request(max_tokens=200)))
        assert len(ids_of(responses)) == 200
        assert process.memory_info().rss - before < 50 * (64 << 10) + (4 << 20)
        assert (await server.stats()).num_free_blocks == parked.num_free_blocks > 0
        # After the stall timeout they are gone from the engine and from admission, although their clients say nothing.
        stats = await server.idle_stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        # A client that reads after all learns why.
        trailers = await streams[0].read_to_end()
        assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        assert "not read" in trailers["grpc-message"]
        for stream in streams:
            stream.abort()


async def _parked(server: Bench, count: int) -> bool:
    return (await server.stats()).num_parked == count


async def test_a_slow_reader_that_comes_back_in_time_misses_nothing(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), stream_buffer_tokens=16) as server:
        raw = tokens_request([9], max_tokens=100).SerializeToString()
        stream = RawStream(server.running.port, "Generate", raw, window=100)
        await stream.open()
        await until(lambda: _parked(server, 1))
        trailers = await stream.read_to_end()
        assert trailers["grpc-status"] == "0"
        responses = [pb.GenerateResponse.FromString(message) for message in stream.messages()]
        assert ids_of(responses) == list(range(10, 110))
        stream.abort()
        await server.idle_stats()


async def test_a_session_that_is_not_read_ends_as_a_whole(tiny_llama_gguf: Path) -> None:
    settings: dict[str, Any] = {"stream_buffer_tokens": 16, "stall_timeout": 0.3}
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.001), **settings) as server:
        starts = [
            pb.SessionRequest(start=pb.SessionStart(generation_id=name, request=tokens_request(max_tokens=480)))
            for name in ("a", "b", "c")
        ]
        stream = RawStream(server.running.port, "Session", *(s.SerializeToString() for s in starts), window=100)
        await stream.open()
        await until(lambda: _parked(server, 3))
        stats = await server.idle_stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        trailers = await stream.read_to_end()
        assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        stream.abort()


async def test_a_long_prompt_does_not_hold_up_the_event_loop(counting: Bench) -> None:
    """Beside a 1 MB text that is being tokenised, the loop turns many times."""
    turns = 0

    async def turn() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    turning = asyncio.ensure_future(turn())
    begin = time.monotonic()
    request = pb.TokenizeRequest(prompt=pb.Prompt(text="the wheel turns " * 60_000))
    response = await counting.stub.Tokenize(request)
    seconds = time.monotonic() - begin
    turning.cancel()
    assert len(response.token_ids) > 60_000
    assert turns > 100, f"{turns} turns in {seconds:.2f} s"
