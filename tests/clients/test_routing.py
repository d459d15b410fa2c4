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

    def error(
        self, code: grpc.StatusCode, reason: str = "", generation_id: str = "g1", *, is_final: bool = False
    ) -> None:
        event = pb.SessionError(generation_id=generation_id, code=code.value[0], reason=reason, is_final=is_final)
        self.router.dispatch(pb.SessionResponse(error=event))


@pytest.fixture
def probe() -> Probe:
    return Probe()


C = grpc.StatusCode


@pytest.mark.parametrize("is_final", [True, False])
def test_only_a_final_error_ends_the_generation(probe: Probe, is_final: bool) -> None:
    probe.started()
    probe.error(C.RESOURCE_EXHAUSTED, "OVERLOADED", is_final=is_final)
    assert probe.router.is_running("g1") is not is_final
    assert isinstance(probe.events[-1], HeadraceError) is is_final
    assert len(probe.refused) == (not is_final)


def test_a_refused_start_ends_the_generation(probe: Probe) -> None:
    probe.error(C.INVALID_ARGUMENT, is_final=True)
    assert isinstance(probe.events[-1], HeadraceError)
    assert not probe.router.is_running("g1")


def test_a_command_that_came_too_late_is_nobodys_business(probe: Probe) -> None:
    probe.started()
    probe.chunk(pb.Finish(reason=pb.FINISH_REASON_STOP))
    probe.error(C.NOT_FOUND, "GENERATION_NOT_FOUND", is_final=True)
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
