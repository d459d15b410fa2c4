"""Session fixtures that all test folders share: the real model and the tiny ones, each made or found once.

torch and transformers are imported only by the fixtures that need them: most test folders start without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.live_server import LiveServer

# Two cores are shared by everything that runs here; results do not depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SMOLLM2 = "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"


class TinyModels:
    """Tiny random models (tests/support/tiny_models.py), written on first use and kept for the session."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def directory(self, architecture: str) -> Path:
        """A Hugging Face directory."""
        from tests.support import tiny_models

        path = self._root / architecture
        return path if path.exists() else tiny_models.write_directory(architecture, path)

    def gguf(self, architecture: str, quantization: str = "F32") -> Path:
        """The same model as a GGUF file."""
        from tests.support import tiny_models

        path = self._root / f"{architecture}.{quantization}.gguf"
        return path if path.exists() else tiny_models.write_gguf(self.directory(architecture), path, quantization)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's GGUF file in the model cache (`make setup` pulls it)."""
    cache = os.environ.get("HEADRACE_CACHE")
    root = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"
    path = root / "models" / SMOLLM2
    if not path.is_file():
        pytest.fail(f"{path.name} is not in the model cache; run `make setup`", pytrace=False)
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> TinyModels:
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.directory("llama")


@pytest.fixture(scope="session")
def tiny_llama_gguf(tiny_models: TinyModels) -> Path:
    return tiny_models.gguf("llama")


@pytest.fixture(scope="session")
def live_server(tiny_llama_gguf: Path) -> Iterator[LiveServer]:
    """A server in a process of its own, on the counting engine: what users of the client and the CLI talk to."""
    from tests.support.live_server import live_server as start

    with start(tiny_llama_gguf) as server:
        yield server
