"""A whole server on the triton back end, as the main suite's server tests expect one.

Its engine process runs the kernels on a GPU, or on a CPU in Triton's own interpreter in float32 (TRITON_INTERPRET=1 is
inherited): the path from gRPC to a Triton kernel. The model is the smallest that all tests can do with.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.conftest import TinyModels
from tests.server import support
from tests.server.conftest import _check_clean
from tests.server.support import Bench, bench

ENGINE = (sys.executable, str(Path(__file__).with_name("interpreted_engine.py")))

# An interpreted step takes a second, and several on a machine that does other things: nothing here may depend on speed.
# What the main suite allows for what "should take milliseconds", and the watchdogs of the server, are made generous.
PATIENCE = 300.0  # seconds
SETTINGS: dict[str, Any] = {
    "backend": "triton",
    "compute_dtype": "fp32",
    "block_size": 16,
    "max_num_seqs": 8,
    "progress_timeout": PATIENCE,
    "hang_timeout": PATIENCE,
    "stall_timeout": PATIENCE,
    "drain_deadline": PATIENCE,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(2 * PATIENCE))


@pytest.fixture(scope="session", autouse=True)
def _patient() -> Iterator[None]:
    before, support.PATIENCE = support.PATIENCE, PATIENCE
    yield
    support.PATIENCE = before


@pytest.fixture(scope="session")
def tiny_llama_gguf(tiny_models: TinyModels) -> Path:
    return tiny_models.gguf("llama-smallest")


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.directory("llama-smallest")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _tiny(tiny_llama_gguf: Path) -> AsyncIterator[Bench]:
    async with bench(tiny_llama_gguf, ENGINE, num_blocks=129, **SETTINGS) as server:
        assert server.running.host.backend.startswith("triton-")
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def tiny(_tiny: Bench) -> AsyncIterator[Bench]:
    """The smallest Llama on the triton back end. After each test everything must have been given back."""
    yield _tiny
    await _check_clean(_tiny)


@pytest_asyncio.fixture(loop_scope="session")
async def counting(tiny: Bench) -> Bench:
    """For tests of the main suite that look at no token: the same server takes the counting engine's place."""
    return tiny
