"""A server on the counting engine for the real programs of this folder, as in tests/server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.server import scripted_engine
from tests.server.support import Bench, bench


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def server(tiny_llama_gguf: Path) -> AsyncIterator[Bench]:
    async with bench(tiny_llama_gguf, scripted_engine.command()) as running:
        yield running
