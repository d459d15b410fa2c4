"""A native server imports no torch in any of its processes: that alone would cost seconds and hundreds of megabytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from headrace.client import Client

from tests.server.cli_support import COMMAND, PATIENCE

FORBIDDEN = {"torch", "transformers", "triton"}


def imports_of(log: Path) -> set[str]:
    """Modules imported by every process that wrote to `log` with -X importtime."""
    lines = (line for line in log.read_text().splitlines() if line.startswith("import time:"))
    return {line.rpartition("|")[2].strip() for line in lines}


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_only_the_torch_back_end_imports_torch(tiny_llama_gguf: Path, tmp_path: Path, backend: str) -> None:
    log = tmp_path / "stderr"
    arguments = ["serve", "--port", "0", "--json", "--lame-duck", "0", "--model", str(tiny_llama_gguf)]
    # The variable, not the option: the engine process and the template process inherit it.
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", "HEADRACE_BACKEND": backend}
    with (
        log.open("w") as stderr,
        subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
        ) as server,
    ):
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            with Client(ready["target"]) as client:
                (completion,) = client.complete("water", max_tokens=4, ignore_eos=True, temperature=1.0)
                assert len(completion.token_ids) == 4
                client.complete(messages=[{"role": "user", "content": "Who mills?"}], max_tokens=2)
                assert client.get_model().backend.startswith(backend)
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0, log.read_text()[-2000:]
        finally:
            server.kill()
    modules = imports_of(log)
    # Both processes have reported, or the test would pass for want of anything to look at.
    assert {"headrace.server.app", "headrace.engine.engine"} <= modules
    packages = {module.partition(".")[0] for module in modules}
    assert packages & FORBIDDEN == (set() if backend == "native" else {"torch"})
