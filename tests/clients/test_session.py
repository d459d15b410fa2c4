"""The blocking session: many generations and conversations on one stream, from many threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from headrace.client import (
    Chunk,
    Client,
    FailedPreconditionError,
    HeadraceError,
    InvalidRequestError,
    Message,
    NotFoundError,
    RequestCancelledError,
    Session,
    UnavailableError,
)

from tests.support.live_server import LONG, LiveServer, live_server, until


@pytest.fixture
def refused() -> list[HeadraceError]:
    """What `on_command_error` heard."""
    return []


@pytest.fixture
def session(live_server: LiveServer, refused: list[HeadraceError]) -> Iterator[Session]:
    with Client(live_server.target) as client:
        with client.session(on_command_error=refused.append) as session:
            yield session
        live_server.wait_idle()


def ids(chunks: Iterator[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def test_generations_are_told_apart(session: Session) -> None:
    generations = {start: session.start(token_ids=[start], max_tokens=5, temperature=0) for start in (10, 50, 90)}
    for start, generation in reversed(generations.items()):  # the last one first: the others are kept meanwhile
        assert ids(generation) == [start + i for i in range(1, 6)]
        assert generation.prompt_tokens == 1
        assert list(generation) == []


def test_threads_iterate_their_own(session: Session) -> None:
    answers: dict[int, list[int]] = {}

    def ask(start: int) -> None:
        answers[start] = ids(session.start(token_ids=[start], max_tokens=4, temperature=0))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(10, 170, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {start: [start + i for i in range(1, 5)] for start in range(10, 170, 10)}


def test_cancel_ends_one_and_no_other(session: Session) -> None:
    doomed = session.start(token_ids=[5], max_tokens=LONG, temperature=0)
    other = session.start(token_ids=[10], max_tokens=20, temperature=0)
    next(doomed)
    doomed.cancel()
    *_, last = doomed
    assert last.finish is not None
    assert last.finish.reason == "cancelled"
    assert last.finish.usage.generated_tokens < LONG / 2
    assert len(ids(other)) == 20


def test_leaving_a_generations_with_block_cancels_it(session: Session, live_server: LiveServer) -> None:
    since = live_server.steps()
    with session.start(token_ids=[5], max_tokens=LONG, temperature=0) as generation:
        next(generation)
        assert live_server.stats()["sequences"] == 1
    live_server.wait_freed(since)


def test_cancelling_what_has_ended_does_nothing(session: Session, refused: list[HeadraceError]) -> None:
    generation = session.start(token_ids=[5], max_tokens=1)
    list(generation)
    generation.cancel()
    generation.update(max_tokens=5)
    session.cancel("never heard of")
    session.ping()
    assert refused == []


def test_update_changes_the_limit(session: Session) -> None:
    generation = session.start(token_ids=[5], max_tokens=LONG, temperature=0)
    next(generation)
    generation.update(max_tokens=12)
    *_, last = generation
    assert last.finish is not None
    assert last.finish.reason == "length"
    assert last.finish.usage.generated_tokens >= 12
    assert last.finish.usage.generated_tokens < 60


def test_a_refused_update_leaves_the_generation_running(session: Session, refused: list[HeadraceError]) -> None:
    generation = session.start(token_ids=[5], max_tokens=30, temperature=0)
    next(generation)
    generation.update(max_tokens=1_000_000)
    assert len(ids(generation)) == 29
    (error,) = refused
    assert type(error) is InvalidRequestError
    assert error.generation_id == generation.id


def test_a_conversation_goes_on(session: Session) -> None:
    first = session.start(messages=[Message("user", "water")], conversation="c", max_tokens=4, temperature=0)
    answer = "".join(chunk.text for chunk in first)
    second = session.append("c", "wheel", max_tokens=3)
    list(second)
    whole = [Message("user", "water"), Message("assistant", answer), Message("user", "wheel")]
    again = session.start(messages=whole, max_tokens=1)
    list(again)
    assert first.prompt_tokens is not None
    assert second.prompt_tokens is not None
    assert second.prompt_tokens > first.prompt_tokens + 4
    # What the server remembers is the conversation that we would have sent; it keeps its own tokens of the answer.
    assert again.prompt_tokens is not None
    assert abs(second.prompt_tokens - again.prompt_tokens) <= 4


def test_failed_starts_raise_in_their_own_iteration(session: Session) -> None:
    running = session.start(messages=[Message("user", "x")], conversation="c", max_tokens=30, temperature=0)
    next(running)
    for bad, kind, reason in (
        (session.append("nope", "hi"), NotFoundError, "CONVERSATION_NOT_FOUND"),
        (session.append("c", "hi"), FailedPreconditionError, "CONVERSATION_BUSY"),
        (session.start("x", top_p=7), InvalidRequestError, "INVALID_REQUEST"),
    ):
        with pytest.raises(kind) as caught:
            list(bad)
        assert caught.value.reason == reason
        assert caught.value.generation_id == bad.id
        assert list(bad) == []
    assert len(ids(running)) == 29


def test_a_name_is_used_once_at_a_time(session: Session) -> None:
    generation = session.start(token_ids=[5], generation_id="mine", max_tokens=3)
    with pytest.raises(ValueError, match="running already"):
        session.start(token_ids=[5], generation_id="mine")
    list(generation)
    list(session.start(token_ids=[5], generation_id="mine", max_tokens=1))


def test_ping_passes_through_the_engine(session: Session) -> None:
    before = session.ping()
    list(session.start(token_ids=[5], max_tokens=4))
    after = session.ping()
    assert after.engine_steps >= before.engine_steps + 4
    assert 0 < after.seconds < 10


def test_drain_lets_what_runs_finish(session: Session) -> None:
    generation = session.start(token_ids=[5], max_tokens=20, temperature=0)
    session.drain()
    assert len(ids(generation)) == 20


def test_closing_a_session_cancels_what_runs(live_server: LiveServer) -> None:
    since = live_server.steps()
    with Client(live_server.target) as client:
        session = client.session()
        generation = session.start(token_ids=[5], max_tokens=LONG, temperature=0)
        next(generation)
        session.close()
        session.close()
        live_server.wait_freed(since)
        with pytest.raises(RequestCancelledError):
            list(generation)
        assert session.has_ended
        with pytest.raises(RequestCancelledError, match="the session has ended"):
            session.start(token_ids=[5])
        with pytest.raises(RequestCancelledError):
            session.ping()


def test_a_server_that_dies_is_seen_by_every_generation(tiny_llama_gguf: Path) -> None:
    with live_server(tiny_llama_gguf) as server, Client(server.target, retries=False) as client:
        session = client.session()
        generations = [session.start(token_ids=[start], max_tokens=LONG, temperature=0) for start in (5, 6)]
        for generation in generations:
            next(generation)
        server.kill()
        for generation in generations:
            with pytest.raises(UnavailableError):
                list(generation)
        until(lambda: session.has_ended)
        session.close()
