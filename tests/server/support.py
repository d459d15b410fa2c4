"""What the tests of the server share: a running server with its stubs, requests, and a reader of rich errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from headrace.engine.types import EngineStats
from headrace.server.app import RunningServer, start_server
from headrace.server.config import ServerConfig
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, models_pb2_grpc

PATIENCE = 20.0  # seconds for what should take milliseconds; only a failure waits that long


@dataclass(frozen=True)
class Bench:
    """A running server and a client of it."""

    running: RunningServer
    channel: grpc.aio.Channel
    stub: Any  # InferenceServiceStub, whose generated types are those of the sync API
    models: Any

    async def stats(self) -> EngineStats:
        """The engine's own counts, fetched through its thread."""
        return await self.running.host.client().ping()

    async def idle_stats(self) -> EngineStats:
        """The counts once nothing runs and the front end has let go of everything: what every test ends with."""

        async def is_idle() -> bool:
            stats = await self.stats()
            return stats.num_running + stats.num_waiting + stats.num_parked == 0

        await until(is_idle)
        await asyncio.wait_for(self.running.admission.wait_idle(), PATIENCE)
        return await self.stats()


@asynccontextmanager
async def bench(model: Path, engine_command: Sequence[str] | None = None, **settings: Any) -> AsyncIterator[Bench]:
    """Start a server on any free port, wait until its model is ready, connect to it."""
    config = ServerConfig(**{"model": str(model), "model_name": "tiny", "port": 0, "lame_duck": 0.0, **settings})
    options = {} if engine_command is None else {"engine_command": engine_command}
    async with start_server(config, **options) as running:
        await asyncio.wait_for(running.wait_ready(), 3 * PATIENCE)
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            yield Bench(running, channel, stub, models_pb2_grpc.ModelServiceStub(channel))


@dataclass(frozen=True)
class Failure:
    """A failed call, with what its details say."""

    code: grpc.StatusCode
    reason: str
    fields: tuple[str, ...]
    message: str
    retry_seconds: float | None
    metadata: dict[str, str | bytes]


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """Read google.rpc details out of a failed call."""
    metadata = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(metadata.get("grpc-status-details-bin", b""))  # type: ignore[arg-type]
    reason, fields, retry = "", (), None
    for detail in status.details:
        if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            info = error_details_pb2.ErrorInfo.FromString(detail.value)
            assert info.domain == "headrace.dev"
            reason = info.reason
        elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            violations = error_details_pb2.BadRequest.FromString(detail.value).field_violations
            fields = tuple(violation.field for violation in violations)
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            retry = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay.ToTimedelta().total_seconds()
    return Failure(error.code(), reason, fields, error.details() or "", retry, metadata)


async def failure(call: Awaitable[Any]) -> Failure:
    """The failure of a call that must fail: a unary call, or `drained(stream)`."""
    try:
        answer = await asyncio.wait_for(call, PATIENCE)
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError(f"the call succeeded: {answer!r:.300}")


async def drained(stream: Any) -> list[Any]:
    """All messages of a stream."""
    return [message async for message in stream]


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Wait until a condition holds; fails after PATIENCE."""

    async def poll() -> None:
        while True:
            holds = condition()
            if await holds if isinstance(holds, Awaitable) else holds:
                return
            await asyncio.sleep(0.01)

    await asyncio.wait_for(poll(), PATIENCE)


def tokens_request(ids: Sequence[int] = (10, 11, 12), **sampling: Any) -> pb.GenerateRequest:
    """Token ids to go on from; 8 tokens, greedy, unless told otherwise."""
    params = pb.SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **sampling})
    return pb.GenerateRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids)), sampling=params)


def chat_prompt(*contents: str) -> pb.Prompt:
    """A chat whose turns are the user's and the assistant's by turns."""
    roles = (pb.ROLE_USER, pb.ROLE_ASSISTANT)
    messages = [pb.ChatMessage(role=roles[i % 2], content=content) for i, content in enumerate(contents)]
    return pb.Prompt(chat=pb.ChatPrompt(messages=messages))


def ids_of(responses: Sequence[pb.GenerateResponse], index: int = 0) -> list[int]:
    """The token ids of one generation, after checking that its offsets have no gaps."""
    ids: list[int] = []
    for response in responses:
        if response.chunk.index == index:
            assert response.chunk.offset == len(ids)
            ids += response.chunk.token_ids
    return ids


def text_of(responses: Sequence[pb.GenerateResponse], index: int = 0) -> str:
    """The text of one generation."""
    return "".join(response.chunk.text for response in responses if response.chunk.index == index)


def finish_of(responses: Sequence[pb.GenerateResponse], index: int = 0) -> pb.Finish:
    """The end of one generation: in its last message, nowhere else."""
    chunks = [response.chunk for response in responses if response.chunk.index == index]
    assert [chunk.HasField("finish") for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    return chunks[-1].finish
