"""The gateway under a real uvicorn, in front of the counting engine and of the tiny Llama; servers of tests/server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest_asyncio
import uvicorn
from headrace.server.gateway.app import GatewaySettings, create_app
from openai import AsyncOpenAI

from tests.server.conftest import _counting, _tiny, counting, tiny
from tests.server.support import Bench

__all__ = ["_counting", "_tiny", "counting", "tiny"]  # fixtures


@dataclass(frozen=True)
class Http:
    """A gateway and OpenAI's own client of it."""

    url: str
    openai: AsyncOpenAI
    server: Bench


@asynccontextmanager
async def gateway(server: Bench, **settings: str) -> AsyncIterator[Http]:
    """A gateway in front of a server."""
    app = create_app(GatewaySettings(target=server.running.address, **settings))  # type: ignore[arg-type]
    listener = socket.create_server(("127.0.0.1", 0))
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
    serving = asyncio.ensure_future(uvicorn_server.serve(sockets=[listener]))
    while not uvicorn_server.started:
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            yield Http(url, client, server)
    finally:
        uvicorn_server.should_exit = True
        await serving
        listener.close()


@pytest_asyncio.fixture(loop_scope="session")
async def http(counting: Bench) -> AsyncIterator[Http]:
    """In front of the counting engine: the token after t is t + 1."""
    async with gateway(counting) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def tiny_http(tiny: Bench) -> AsyncIterator[Http]:
    """In front of the tiny Llama."""
    async with gateway(tiny) as running:
        yield running
