"""HEADRACE_BACKEND=triton as an operator sets it: the server as it is, in Triton's own interpreter or on a GPU.

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

from headrace.client import Client

from tests.conftest import TinyModels
from tests.gpu.e2e.conftest import PATIENCE
from tests.server.cli_support import COMMAND


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HEADRACE_BACKEND": "triton"}
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=PATIENCE, check=True
    )


def test_the_environment_chooses_the_back_end(tiny_llama_gguf: Path) -> None:
    options = ["--port", "0", "--json", "--lame-duck", "0", "--model", str(tiny_llama_gguf), "--kv-cache-tokens", "512"]
    environment = {**os.environ, "HEADRACE_BACKEND": "triton", "HEADRACE_COMPUTE_DTYPE": "fp32"}
    with subprocess.Popen([*COMMAND, "serve", *options], stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            with Client(ready["target"]) as client:
                assert client.get_model().backend.startswith("triton-")
                (first,) = client.complete("water", max_tokens=6, ignore_eos=True, temperature=0.0)
                (again,) = client.complete("water", max_tokens=6, ignore_eos=True, temperature=0.0)
                assert len(first.token_ids) == 6
                assert again.token_ids == first.token_ids
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()


def test_the_doctor_names_it_and_says_why() -> None:
    report = json.loads(run_command("doctor", "--json").stdout)
    (chosen,) = [backend for backend in report["backends"] if backend["is_chosen"]]
    assert chosen["name"].startswith("triton-")
    assert chosen["why"]


def test_a_kv_type_that_does_not_go_with_the_compute_type_is_a_sentence(tiny_models: TinyModels) -> None:
    options = ["--port", "0", "--model", str(tiny_models.gguf("llama-smallest"))]
    environment = {**os.environ, "HEADRACE_BACKEND": "triton", "HEADRACE_COMPUTE_DTYPE": "bf16"}
    done = subprocess.run(
        [*COMMAND, "serve", *options, "--kv-dtype", "fp16"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode != 0
    assert "not fp16 with bf16" in done.stderr + done.stdout
