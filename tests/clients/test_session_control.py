"""What both sessions do to a generation that runs: interrupt, pause, resume, grant, update. The engine counts."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from headrace.client import AsyncClient, AsyncSession, Chunk, Client, HeadraceError, Message, Session
from headrace.client.aio_session import AsyncSessionGeneration
from headrace.client.sync_session import SessionGeneration

from tests.support.live_server import LONG, LiveServer

VERBS = ("interrupt", "pause", "resume", "grant", "update", "cancel")


@pytest.fixture
def refused() -> list[HeadraceError]:
    """What `on_command_error` heard."""
    return []


@pytest.fixture
def session(live_server: LiveServer, refused: list[HeadraceError]) -> Iterator[Session]:
    with Client(live_server.target) as client, client.session(on_command_error=refused.append) as session:
        yield session
    live_server.wait_idle()


@pytest_asyncio.fixture
async def aio(live_server: LiveServer, refused: list[HeadraceError]) -> AsyncIterator[AsyncSession]:
    async with (
        AsyncClient(live_server.target) as client,
        client.session(on_command_error=refused.append) as session,
    ):
        yield session


def ids(chunks: list[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def take(generation: SessionGeneration, count: int) -> list[Chunk]:
    """Chunks of the next `count` tokens."""
    chunks: list[Chunk] = []
    while len(ids(chunks)) < count:
        chunks.append(next(generation))
    return chunks


async def atake(generation: AsyncSessionGeneration, count: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    while len(ids(chunks)) < count:
        chunks.append(await generation.__anext__())
    return chunks


def test_both_sessions_have_the_same_verbs() -> None:
    for ours, theirs in ((Session, AsyncSession), (SessionGeneration, AsyncSessionGeneration)):
        for name in (*VERBS, *(("start", "append") if ours is Session else ())):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert inspect.signature(mine).parameters == inspect.signature(other).parameters, name
            assert not inspect.iscoroutinefunction(other), "commands never wait"


def test_interrupt_goes_on_from_what_was_heard(session: Session) -> None:
    lengths = []
    for conversation, heard in (("all", None), ("some", 4)):
        first = session.start(
            messages=[Message("user", "water")], conversation=conversation, credit=10, max_tokens=LONG, temperature=0
        )
        assert len(ids(take(first, 10))) == 10
        first.interrupt(heard)
        *_, last = first
        assert last.finish is not None
        assert (last.finish.reason, last.finish.usage.generated_tokens) == ("interrupted", 10)
        second = session.append(conversation, "wheel", max_tokens=1)
        list(second)
        assert second.prompt_tokens is not None
        lengths.append(second.prompt_tokens)
    assert lengths[0] - lengths[1] == 6


def test_credit_pauses_to_the_token(session: Session) -> None:
    slow = session.start(token_ids=[5], credit=3, max_tokens=20, temperature=0)
    assert ids(take(slow, 3)) == [6, 7, 8]
    assert len(ids(list(session.start(token_ids=[5], max_tokens=30, temperature=0)))) == 30
    slow.grant(2)
    assert ids(take(slow, 2)) == [9, 10]
    slow.grant(100)
    assert ids(list(slow)) == list(range(11, 26))


def test_credit_of_an_appended_turn(session: Session) -> None:
    list(session.start(messages=[Message("user", "water")], conversation="c", max_tokens=1))
    answer = session.append("c", "wheel", credit=0, max_tokens=3, temperature=0)
    session.ping()
    answer.grant(3)
    assert len(ids(list(answer))) == 3


def test_pause_and_resume(session: Session, live_server: LiveServer) -> None:
    generation = session.start(token_ids=[5], max_tokens=60, temperature=0)
    chunks = take(generation, 3)
    generation.pause()
    generation.pause()
    session.ping()
    before = live_server.steps()
    list(session.start(token_ids=[5], max_tokens=10))
    assert live_server.steps() - before <= 12  # nothing else ran
    generation.resume()
    generation.resume()
    assert ids(chunks + list(generation)) == list(range(6, 66))


def test_update_takes_limits_and_stop_conditions(session: Session) -> None:
    generation = session.start(token_ids=[34], credit=2, max_tokens=LONG, temperature=0)  # "A", "B", ...
    take(generation, 2)
    generation.update(max_tokens=50, stop_conditions={"stop": ["GH"]})
    generation.grant(100)
    *_, last = generation
    assert last.finish is not None
    assert (last.finish.reason, last.finish.stop_string) == ("stop", "GH")
    for bad in ({}, {"stop_conditions": {"stops": ["x"]}}):
        with pytest.raises(TypeError):
            generation.update(**bad)  # type: ignore[arg-type]


def test_refusals_are_heard_and_change_nothing(session: Session, refused: list[HeadraceError]) -> None:
    generation = session.start(token_ids=[5], max_tokens=40, temperature=0)
    chunks = take(generation, 1)
    generation.grant(5)
    generation.interrupt(heard_tokens=10_000)
    generation.update(stop_conditions={"stop": [""]})
    session.ping()
    assert len(ids(chunks + list(generation))) == 40
    for verb in ("pause", "resume", "interrupt", "cancel"):  # after its end: nothing is sent
        getattr(generation, verb)()
    generation.grant(1)
    session.ping()
    assert [error.reason for error in refused] == ["CREDIT_UNLIMITED", "INVALID_REQUEST", "INVALID_REQUEST"]
    assert {error.generation_id for error in refused} == {generation.id}


@pytest.mark.asyncio
async def test_the_same_with_asyncio(aio: AsyncSession, refused: list[HeadraceError]) -> None:
    first = aio.start(messages=[Message("user", "a")], conversation="c", credit=4, max_tokens=LONG, temperature=0)
    chunks = await atake(first, 4)
    first.pause()
    first.grant(4)
    await aio.ping()
    first.resume()
    chunks += await atake(first, 4)
    first.interrupt(heard_tokens=6)
    last = [chunk async for chunk in first][-1]
    assert last.finish is not None
    assert last.finish.reason == "interrupted"
    second = aio.append("c", "b", credit=1, max_tokens=LONG, temperature=0)
    await atake(second, 1)
    second.update(stop_conditions={"stop_token_ids": [ids(chunks)[0]]}, max_tokens=5)
    second.grant(10)
    last = [chunk async for chunk in second][-1]
    assert last.finish is not None
    assert last.finish.reason in ("stop", "length")
    assert refused == []
