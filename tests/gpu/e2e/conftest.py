"""A whole server on the triton back end, as the main suite's server tests expect one.

Its engine process runs the kernels on a GPU, or on a CPU in Triton's own interpreter in float32 (TRITON_INTERPRET=1 is
inherited): the path from gRPC to a Triton kernel. The model is the smallest that all tests can do with.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import TinyModels
from tests.server.conftest import _check_clean
from tests.server.support import Bench, bench

ENGINE = (sys.executable, str(Path(__file__).with_name("interpreted_engine.py")))


@pytest.fixture(scope="session")
def tiny_llama_gguf(tiny_models: TinyModels) -> Path:
    return tiny_models.gguf("llama-smallest")


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.directory("llama-smallest")


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def _tiny(tiny_llama_gguf: Path) -> AsyncIterator[Bench]:
    settings = {"backend": "triton", "compute_dtype": "fp32", "block_size": 16, "max_num_seqs": 8}
    async with bench(tiny_llama_gguf, ENGINE, num_blocks=129, **settings) as server:
        assert server.running.host.backend.startswith("triton-")
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def tiny(_tiny: Bench) -> AsyncIterator[Bench]:
    """The smallest Llama on the triton back end. After each test everything must have been given back."""
    yield _tiny
    await _check_clean(_tiny)
