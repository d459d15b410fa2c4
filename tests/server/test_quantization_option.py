"""`headrace serve --quantization`, as an operator types it, where it cannot be had: a sentence and an exit status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.server.cli_support import COMMAND


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--quantization", "int8"], "the native back end serves weights as the file stores them"),
        (["--quantization", "awq"], "'fp8-block'"),
    ],
)
def test_what_cannot_be_quantised_is_said_at_start(tiny_llama_gguf: Path, option: list[str], message: str) -> None:
    command = [*COMMAND, "serve", "--model", str(tiny_llama_gguf), "--port", "0", "--backend", "native", *option]
    environment = {**os.environ, "COLUMNS": "400"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode != 0
    assert message in done.stderr + done.stdout
