"""Which generation an event of a session belongs to, and which errors end one: the cases that races decide."""

from __future__ import annotations

import grpc
import pytest
from headrace.client import HeadraceError, Pong
from headrace.client.errors import make_error
from headrace.client.routing import Event, SessionRouter, Started
from headrace.v1 import inference_pb2 as pb


class Probe:
    """A router with one open generation, "g1"."""

    def __init__(self) -> None:
        self.refused: list[HeadraceError] = []
        self.events: list[Event] = []
        self.router = SessionRouter(self.refused.append)
        assert self.router.open(None, self.events.append) == "g1"

    def started(self) -> None:
        self.router.dispatch(pb.SessionResponse(started=pb.SessionStarted(generation_id="g1", prompt_tokens=3)))

    def chunk(self, finish: pb.Finish | None = None) -> None:
        chunk = pb.SessionChunk(generation_id="g1", chunk=pb.GenerationChunk(text="x", finish=finish))
        self.router.dispatch(pb.SessionResponse(chunk=chunk))

    def error(self, code: grpc.StatusCode, reason: str = "", generation_id: str = "g1") -> None:
        event = pb.SessionError(generation_id=generation_id, code=code.value[0], reason=reason)
        self.router.dispatch(pb.SessionResponse(error=event))


@pytest.fixture
def probe() -> Probe:
    return Probe()


C = grpc.StatusCode


def test_every_error_before_the_start_ends_the_generation(probe: Probe) -> None:
    probe.error(C.INVALID_ARGUMENT)
    assert isinstance(probe.events[-1], HeadraceError)
    assert not probe.router.is_running("g1")


@pytest.mark.parametrize(
    ("code", "reason", "has_chunk", "ends"),
    [
        (C.INVALID_ARGUMENT, "INVALID_REQUEST", False, False),  # an update out of range
        (C.RESOURCE_EXHAUSTED, "OVERLOADED", True, False),  # an update for which there is no room
        (C.RESOURCE_EXHAUSTED, "OVERLOADED", False, True),  # the engine's queue was full after all
        (C.RESOURCE_EXHAUSTED, "TIME_LIMIT", True, True),
        (C.INTERNAL, "NUMERIC", True, True),
        (C.UNAVAILABLE, "ENGINE_RESTARTED", False, True),
    ],
)
def test_which_errors_end_a_running_generation(
    probe: Probe, code: grpc.StatusCode, reason: str, has_chunk: bool, ends: bool
) -> None:
    probe.started()
    if has_chunk:
        probe.chunk()
    probe.error(code, reason)
    assert probe.router.is_running("g1") is not ends
    assert isinstance(probe.events[-1], HeadraceError) is ends
    assert len(probe.refused) == (not ends)


def test_a_command_that_came_too_late_is_nobodys_business(probe: Probe) -> None:
    probe.started()
    probe.chunk(pb.Finish(reason=pb.FINISH_REASON_STOP))
    probe.error(C.NOT_FOUND, "GENERATION_NOT_FOUND")
    assert probe.refused == []
    probe.error(C.INVALID_ARGUMENT, generation_id="")
    assert len(probe.refused) == 1


def test_late_and_strange_events_are_dropped(probe: Probe) -> None:
    probe.started()
    probe.chunk(pb.Finish(reason=pb.FINISH_REASON_STOP))
    seen = len(probe.events)
    probe.chunk()
    probe.started()
    probe.router.dispatch(pb.SessionResponse(pong=pb.SessionPong(nonce=77)))
    probe.router.dispatch(pb.SessionResponse())
    assert len(probe.events) == seen
    assert probe.events[0] == Started(3)


def test_pongs_find_their_pings(probe: Probe) -> None:
    pongs: list[Pong | HeadraceError] = []
    nonces = [probe.router.open_ping(pongs.append) for _ in range(2)]
    assert len(set(nonces)) == 2
    probe.router.dispatch(pb.SessionResponse(pong=pb.SessionPong(nonce=nonces[1], engine_steps=5)))
    (pong,) = pongs
    assert isinstance(pong, Pong)
    assert pong.engine_steps == 5


def test_the_end_reaches_everything_that_is_open_and_what_comes_later(probe: Probe) -> None:
    pongs: list[Pong | HeadraceError] = []
    probe.router.open_ping(pongs.append)
    error = make_error(C.UNAVAILABLE, "gone")
    probe.router.end(error)
    probe.router.end(make_error(C.CANCELLED, "later"))
    assert probe.events == [error]
    assert pongs == [error]
    with pytest.raises(HeadraceError, match="UNAVAILABLE: the session has ended: gone"):
        probe.router.open(None, probe.events.append)
