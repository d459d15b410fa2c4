"""Calls that are refused before they are admitted are tried again when the server says so, and no others are.

The first half counts tries on a bare gRPC handler; the second fills a whole server up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from headrace.client import AsyncClient, Client, HeadraceError, InvalidRequestError, OverloadedError
from headrace.v1 import inference_pb2 as pb

from tests.support.live_server import LiveServer, live_server, until


@dataclass
class Refuser:
    """A handler of Tokenize that refuses as many calls as it is told to, and keeps what it saw."""

    target: str = ""
    num_refusals: int = 0
    code: grpc.StatusCode = grpc.StatusCode.RESOURCE_EXHAUSTED
    pushback: str | None = None
    seen: list[dict[str, str | bytes]] = field(default_factory=list)

    def answer(self, request: pb.TokenizeRequest, context: grpc.ServicerContext) -> pb.TokenizeResponse:
        self.seen.append(dict(context.invocation_metadata()))
        if len(self.seen) <= self.num_refusals:
            if self.pushback is not None:
                context.set_trailing_metadata((("grpc-retry-pushback-ms", self.pushback),))
            context.abort(self.code, "refused")
        return pb.TokenizeResponse(token_ids=[1])


@pytest.fixture
def refuser() -> Iterator[Refuser]:
    refuser = Refuser()
    handler = grpc.unary_unary_rpc_method_handler(
        refuser.answer, pb.TokenizeRequest.FromString, pb.TokenizeResponse.SerializeToString
    )
    service = grpc.method_handlers_generic_handler("headrace.v1.InferenceService", {"Tokenize": handler})
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((service,))
        refuser.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield refuser
        server.stop(0).wait()


@pytest.mark.parametrize("code", [grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE])
def test_a_refused_call_is_tried_again_after_the_pushback(refuser: Refuser, code: grpc.StatusCode) -> None:
    refuser.num_refusals, refuser.code, refuser.pushback = 3, code, "10"
    with Client(refuser.target) as client:
        assert client.tokenize("x").token_ids == (1,)
    assert len(refuser.seen) == 4


async def test_asyncio_tries_again_too(refuser: Refuser) -> None:
    refuser.num_refusals, refuser.pushback = 2, "10"
    async with AsyncClient(refuser.target) as client:
        assert (await client.tokenize("x")).token_ids == (1,)
    assert len(refuser.seen) == 3


def test_a_negative_pushback_means_no(refuser: Refuser) -> None:
    refuser.num_refusals, refuser.pushback = 3, "-1"
    with Client(refuser.target) as client, pytest.raises(OverloadedError):
        client.tokenize("x")
    assert len(refuser.seen) == 1


def test_four_tries_are_enough(refuser: Refuser) -> None:
    refuser.num_refusals, refuser.pushback = 9, "1"
    with Client(refuser.target) as client, pytest.raises(OverloadedError):
        client.tokenize("x")
    assert len(refuser.seen) == 4


def test_what_is_wrong_stays_wrong(refuser: Refuser) -> None:
    refuser.num_refusals, refuser.code = 3, grpc.StatusCode.INVALID_ARGUMENT
    with Client(refuser.target) as client, pytest.raises(InvalidRequestError):
        client.tokenize("x")
    assert len(refuser.seen) == 1


def test_retries_can_be_switched_off(refuser: Refuser) -> None:
    refuser.num_refusals, refuser.pushback = 1, "1"
    with Client(refuser.target, retries=False) as client, pytest.raises(OverloadedError):
        client.tokenize("x")
    assert len(refuser.seen) == 1


def test_metadata_goes_along(refuser: Refuser) -> None:
    with Client(refuser.target, metadata={"X-Tenant": "a"}) as client:
        client.tokenize("x", metadata=[("traceparent", "00-1-2-01")])
        client.tokenize("x")
    first, second = refuser.seen
    assert (first["x-tenant"], first["traceparent"]) == ("a", "00-1-2-01")
    assert str(first["user-agent"]).startswith("headrace-python/")
    assert second["x-tenant"] == "a"
    assert "traceparent" not in second


@pytest.fixture(scope="module")
def small_server(tiny_llama_gguf: Path) -> Iterator[LiveServer]:
    with live_server(tiny_llama_gguf, max_live_sequences=1) as server:
        yield server


def test_a_full_server_refuses_and_says_when_to_come_again(small_server: LiveServer) -> None:
    with (
        Client(small_server.target, retries=False) as client,
        client.generate(token_ids=[5], max_tokens=400, temperature=0) as first,
    ):
        next(first)
        with pytest.raises(OverloadedError) as caught:
            client.complete(token_ids=[5], max_tokens=1)
        assert caught.value.reason == "OVERLOADED"
        assert caught.value.retry_after is not None
        with client.session() as session, pytest.raises(OverloadedError) as inside:
            list(session.start(token_ids=[5]))
        assert inside.value.retry_after is not None
    small_server.wait_idle()


def test_a_call_gets_in_when_there_is_room_again(small_server: LiveServer) -> None:
    answers: list[tuple[int, ...] | HeadraceError] = []

    def ask() -> None:
        try:
            answers.append(client.complete(token_ids=[5], max_tokens=2, temperature=0)[0].token_ids)
        except HeadraceError as error:
            answers.append(error)

    with Client(small_server.target) as client:
        with client.generate(token_ids=[5], max_tokens=400, temperature=0) as first:
            next(first)
            thread = threading.Thread(target=ask)
            thread.start()
            next(first)
        thread.join()
    assert answers == [(6, 7)]
    until(lambda: small_server.stats()["sequences"] == 0)
