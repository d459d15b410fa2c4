"""Two servers that live as long as the test session: one on the real tiny model, one on the counting engine."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from tests.server import scripted_engine
from tests.server.support import Bench, bench


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _tiny(tiny_llama_gguf: Path) -> AsyncIterator[Bench]:
    async with bench(tiny_llama_gguf, num_blocks=129) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _counting(tiny_llama_gguf: Path) -> AsyncIterator[Bench]:
    async with bench(tiny_llama_gguf, scripted_engine.command()) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def tiny(_tiny: Bench) -> AsyncIterator[Bench]:
    """The tiny Llama on the chosen back end. After each test everything must have been given back."""
    yield _tiny
    await _check_clean(_tiny)


@pytest_asyncio.fixture(loop_scope="session")
async def counting(_counting: Bench) -> AsyncIterator[Bench]:
    """The counting engine (scripted_engine.py) behind the tiny Llama's tokenizer. Checked after each test likewise."""
    yield _counting
    await _check_clean(_counting)


async def _check_clean(server: Bench) -> None:
    stats = await server.idle_stats()
    admission = server.running.admission.stats()
    assert stats.num_free_blocks == stats.num_total_blocks
    assert admission.num_created == admission.num_closed
    assert (admission.num_live, admission.num_sequences, admission.num_tokens) == (0, 0, 0)
    assert server.running.host.client().num_streams == 0
    assert server.running.host.state == "ready"
