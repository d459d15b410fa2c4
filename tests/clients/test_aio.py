"""The asyncio client against a whole server: what differs from the blocking one is how it waits, and how it is left."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from headrace.client import (
    AsyncClient,
    AsyncSession,
    DeadlineExceededError,
    HeadraceError,
    InvalidRequestError,
    Message,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
)

from tests.support.live_server import LONG, LiveServer, live_server


@pytest_asyncio.fixture
async def client(live_server: LiveServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(live_server.target) as client:
        yield client
    live_server.wait_idle()


@pytest_asyncio.fixture
async def session(client: AsyncClient) -> AsyncIterator[AsyncSession]:
    async with client.session() as session:
        yield session


async def test_generate_streams(client: AsyncClient) -> None:
    chunks = [chunk async for chunk in client.generate(token_ids=[10, 11], max_tokens=4, temperature=0)]
    assert [i for chunk in chunks for i in chunk.token_ids] == [12, 13, 14, 15]
    assert chunks[-1].finish is not None


async def test_unary_calls(client: AsyncClient) -> None:
    ids = (await client.tokenize("water wheel")).token_ids
    assert await client.detokenize(ids) == "water wheel"
    assert len((await client.score("water wheel")).logprobs) == len(ids) - 1
    (completion,) = await client.complete(messages=[Message("user", "x")], max_tokens=2)
    assert len(completion.token_ids) == 2
    assert [model.name for model in await client.models()] == ["tiny"]
    assert (await client.get_model()).state == "ready"
    await client.wait_ready(5)


async def test_errors_are_decoded(client: AsyncClient) -> None:
    with pytest.raises(NotFoundError, match="MODEL_NOT_FOUND"):
        await client.tokenize("x", model="nope")
    with pytest.raises(InvalidRequestError) as caught:
        await client.generate("x", top_p=7).__anext__()
    assert [violation.field for violation in caught.value.fields] == ["sampling.top_p"]
    with pytest.raises(DeadlineExceededError):
        await client.complete(token_ids=[5], max_tokens=LONG, temperature=0, timeout=0.1)


async def test_closing_frees_the_servers_work(client: AsyncClient, live_server: LiveServer) -> None:
    since = live_server.steps()
    chunks = client.generate(token_ids=[5], max_tokens=LONG, temperature=0)
    await chunks.__anext__()
    assert live_server.stats()["sequences"] == 1
    await chunks.aclose()
    assert [chunk async for chunk in chunks] == []
    await asyncio.to_thread(live_server.wait_freed, since)


async def test_leaving_the_with_block_frees_the_servers_work(client: AsyncClient, live_server: LiveServer) -> None:
    since = live_server.steps()
    async with client.generate(token_ids=[5], max_tokens=LONG, temperature=0) as chunks:
        await chunks.__anext__()
    await asyncio.to_thread(live_server.wait_freed, since)


async def test_cancelling_the_reading_task_frees_the_servers_work(client: AsyncClient, live_server: LiveServer) -> None:
    since = live_server.steps()

    async def read() -> None:
        async for _ in client.generate(token_ids=[5], max_tokens=LONG, temperature=0):
            started.set()

    started = asyncio.Event()
    task = asyncio.create_task(read())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(live_server.wait_freed, since)


async def test_closing_from_another_task_ends_the_iteration(client: AsyncClient) -> None:
    async def close_soon() -> None:
        await asyncio.sleep(0.05)
        await chunks.aclose()

    chunks = client.generate(token_ids=[5], max_tokens=LONG, temperature=0)
    await chunks.__anext__()
    closing = asyncio.create_task(close_soon())
    assert len([chunk async for chunk in chunks]) < LONG / 2
    await closing


async def test_a_session_multiplexes(session: AsyncSession) -> None:
    async def ask(start: int) -> list[int]:
        generation = session.start(token_ids=[start], max_tokens=4, temperature=0)
        found = [i async for chunk in generation for i in chunk.token_ids]
        assert generation.prompt_tokens == 1
        return found

    starts = range(10, 170, 10)
    answers = await asyncio.gather(*map(ask, starts))
    assert answers == [[start + i for i in range(1, 5)] for start in starts]
    pong = await session.ping()
    assert pong.engine_steps >= 4


async def test_cancel_update_and_append(session: AsyncSession) -> None:
    first = session.start(messages=[Message("user", "a")], conversation="c", max_tokens=LONG, temperature=0)
    await first.__anext__()
    first.cancel()
    last = [chunk async for chunk in first][-1]
    assert last.finish is not None
    assert last.finish.reason == "cancelled"
    second = session.append("c", "b", max_tokens=LONG)
    await second.__anext__()
    second.update(max_tokens=6)
    last = [chunk async for chunk in second][-1]
    assert last.finish is not None
    assert last.finish.reason == "length"
    with pytest.raises(NotFoundError):
        await session.append("nope", "b").__anext__()


async def test_closing_a_session_cancels_what_runs(client: AsyncClient, live_server: LiveServer) -> None:
    since = live_server.steps()
    session = client.session()
    generation = session.start(token_ids=[5], max_tokens=LONG, temperature=0)
    await generation.__anext__()
    await session.aclose()
    await session.aclose()
    await asyncio.to_thread(live_server.wait_freed, since)
    with pytest.raises(RequestCancelledError):
        [chunk async for chunk in generation]
    with pytest.raises(RequestCancelledError, match="the session has ended"):
        session.start("x")


async def test_a_server_that_dies_is_seen(tiny_llama_gguf: Path) -> None:
    with live_server(tiny_llama_gguf) as server:
        async with AsyncClient(server.target, retries=False) as client, client.session() as session:
            inside = session.start(token_ids=[5], max_tokens=LONG, temperature=0)
            outside = client.generate(token_ids=[5], max_tokens=LONG, temperature=0)
            await inside.__anext__()
            await outside.__anext__()
            server.kill()
            for chunks in (inside, outside):
                with pytest.raises(UnavailableError):
                    [chunk async for chunk in chunks]
            with pytest.raises(HeadraceError):
                await client.models(timeout=5)
