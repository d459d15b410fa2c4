"""Sessions in which nothing runs: they take no place, end after a while, and hold up nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.support import bench, chat_prompt, drained, failure, finish_of, tokens_request, until
from tests.server.talk import Talk

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT = pb.GenerateRequest(prompt=chat_prompt("hi"), sampling=pb.SamplingParams(max_tokens=2))


async def test_an_idle_session_ends_and_one_with_something_paused_does_not(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), session_idle_timeout=0.4) as server:
        idle, busy = Talk(server.stub), Talk(server.stub)
        await idle.start("a", CHAT, "chat")
        await idle.until_ended("a")
        await busy.start("b", tokens_request(max_tokens=20), credit=3)
        await busy.until_sent("b", 3)
        failed = await failure(idle.call.read())
        assert (failed.code, failed.reason) == (grpc.StatusCode.ABORTED, "SESSION_IDLE")
        await until(lambda: server.running.admission.stats().num_live == 2)  # the other session and its generation
        await asyncio.sleep(0.5)
        await busy.send(credit=pb.SessionCredit(generation_id="b", tokens=100))
        await busy.until_ended("b")
        await busy.end()


async def test_an_idle_session_takes_no_place(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), max_live_sequences=1) as server:
        sessions = [Talk(server.stub) for _ in range(3)]
        for session in sessions:
            await session.start("a", CHAT, "chat")
            await session.until_ended("a")
        assert server.running.admission.stats().num_sequences == 0
        assert finish_of(await drained(server.stub.Generate(tokens_request(max_tokens=3)))).usage.generated_tokens == 3
        for session in sessions:
            await session.append("b", "chat", "ho", max_tokens=1)
            await session.until_ended("b")
            await session.end()


async def test_an_idle_session_does_not_hold_up_a_drain(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), drain_deadline=60.0) as server:
        talk = Talk(server.stub)
        await talk.start("a", CHAT, "chat")
        await talk.until_ended("a")
        await asyncio.wait_for(server.running.drain(), 20)
        failed = await failure(talk.call.read())
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
