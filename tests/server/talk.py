"""A client's end of a session, for the tests of sessions here and in tests/mesh."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from headrace.v1 import inference_pb2 as pb

from tests.server.support import PATIENCE, ids_of, text_of


class Talk:
    """Sorts events by generation; all of them stay in `heard`."""

    def __init__(self, stub: Any, **options: Any) -> None:
        self.call = stub.Session(**options)
        self.heard: dict[str, list[pb.SessionResponse]] = {}

    async def send(self, **command: Any) -> None:
        await self.call.write(pb.SessionRequest(**command))

    async def start(
        self, generation_id: str, request: pb.GenerateRequest, conversation_id: str = "", credit: int | None = None
    ) -> None:
        start = pb.SessionStart(
            generation_id=generation_id, request=request, conversation_id=conversation_id, credit_tokens=credit
        )
        await self.send(start=start)

    async def append(self, generation_id: str, conversation_id: str, content: str, **sampling: Any) -> None:
        message = pb.ChatMessage(role=pb.ROLE_USER, content=content)
        append = pb.SessionAppend(generation_id=generation_id, conversation_id=conversation_id, messages=[message])
        if sampling:
            append.sampling.CopyFrom(pb.SamplingParams(**sampling))
        await self.send(append=append)

    async def event(self) -> pb.SessionResponse:
        """The next one; there must be one."""
        event = await self.event_or_end()
        assert event is not None
        return event

    async def event_or_end(self) -> pb.SessionResponse | None:
        event: pb.SessionResponse = await asyncio.wait_for(self.call.read(), PATIENCE)
        if event is grpc.aio.EOF:
            return None
        if not event.HasField("pong"):
            self.heard.setdefault(getattr(event, event.WhichOneof("event")).generation_id, []).append(event)
        return event

    async def ping(self) -> None:
        """Come back when the engine has carried out all commands before, whatever else is said meanwhile."""
        await self.send(ping=pb.SessionPing(nonce=1))
        while not (await self.event()).HasField("pong"):
            pass

    async def until_sent(self, generation_id: str, count: int) -> None:
        """Read until a generation has sent so many tokens at least."""
        while len(ids(self.heard.get(generation_id, []))) < count:
            await self.event()

    async def until_ended(self, *generation_ids: str) -> dict[str, list[pb.SessionResponse]]:
        """Events by generation until these have ended (by a finish or an error)."""
        events: dict[str, list[pb.SessionResponse]] = {}
        waiting = set(generation_ids)
        while waiting:
            event = await self.event()
            name = getattr(event, event.WhichOneof("event")).generation_id
            events.setdefault(name, []).append(event)
            if event.HasField("error") or event.chunk.chunk.HasField("finish"):
                waiting.discard(name)
        return events

    async def error(self) -> pb.SessionError:
        event = await self.event()
        assert event.HasField("error"), event
        return event.error

    async def end(self) -> None:
        """Half-close; the server must end the stream with OK."""
        await self.call.done_writing()
        assert await asyncio.wait_for(self.call.read(), PATIENCE) is grpc.aio.EOF
        assert await self.call.code() == grpc.StatusCode.OK


def chunks(events: list[pb.SessionResponse]) -> list[pb.GenerateResponse]:
    return [pb.GenerateResponse(chunk=event.chunk.chunk) for event in events if event.HasField("chunk")]


def finish(events: list[pb.SessionResponse]) -> pb.Finish:
    """The last one's end; empty where it has none."""
    endings = [event.chunk.chunk.finish for event in events if event.chunk.chunk.HasField("finish")]
    return endings[-1] if endings else pb.Finish()


def ids(events: list[pb.SessionResponse]) -> list[int]:
    """Token ids of one generation; their offsets have no gaps."""
    return ids_of(chunks(events))


def text(events: list[pb.SessionResponse]) -> str:
    """Text of one generation."""
    return text_of(chunks(events))
