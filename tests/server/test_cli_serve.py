"""`headrace serve` and `headrace demo`: from a model file to a server that answers, and down again."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path

import pytest
from headrace.client import Client

from tests.server.cli_support import PATIENCE, Invoke, invoke, spawned

__all__ = ["invoke"]  # a fixture


def test_serve_answers_until_it_is_told_to_stop(tiny_llama_gguf: Path) -> None:
    arguments = ("serve", "--port", "0", "--json", "--kv-cache-tokens", "1024", "--lame-duck", "0")
    with spawned(*arguments, HEADRACE_MODEL=str(tiny_llama_gguf), HEADRACE_NAME="mill") as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        assert ready["model"] == "mill"
        with Client(ready["target"]) as client:
            (completion,) = client.complete("water", max_tokens=4, ignore_eos=True)
            assert len(completion.token_ids) == 4
            assert client.get_model().backend.startswith("native-")
        process.send_signal(signal.SIGTERM)
        rest, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        assert rest == ""
        assert "Traceback" not in log


def test_the_back_end_and_its_blocks_can_be_chosen(tiny_llama_gguf: Path) -> None:
    common = ("serve", "--port", "0", "--json", "--model", str(tiny_llama_gguf), "--lame-duck", "0")
    for backend, kv_dtype in (("torch", "fp32"), ("native", "int8")):
        with spawned(*common, "--kv-dtype", kv_dtype, HEADRACE_BACKEND=backend) as process:
            assert process.stdout is not None
            with Client(json.loads(process.stdout.readline())["target"]) as client:
                assert client.get_model().backend.startswith(backend)
                (completion,) = client.complete("water", max_tokens=4, ignore_eos=True)
                assert len(completion.token_ids) == 4
    with spawned(*common, "--backend", "torch", "--kv-dtype", "int8") as process:
        _, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert "fp32 only, not in int8" in log
        assert "Traceback" not in log


def test_serve_says_what_to_try_next(tiny_llama_gguf: Path) -> None:
    with spawned("serve", "--port", "0", "--model", str(tiny_llama_gguf), "--lame-duck", "0") as process:
        assert process.stdout is not None
        lines = []
        while not lines or "Ctrl-C" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        shown = "".join(lines)
        target = lines[0].split()[-1]
        for hint in (f"headrace chat --target {target}", "grpcurl -plaintext", f'Client("{target}")', "native-"):
            assert hint in shown


def test_all_faults_of_a_configuration_are_told_at_once(invoke: Invoke) -> None:
    wrong = invoke("serve", "--max-num-seqs", "0", "--max-model-len", "-1", "--name", "no blanks")
    assert wrong.status == 2
    assert wrong.out == ""
    assert wrong.err.count("error:") == 3
    assert all(name in wrong.err for name in ("max_num_seqs", "max_model_len", "model_name"))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 200])
def test_a_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with spawned("serve", "--port", "0", "--json", "--model", str(path), "--lame-duck", "0") as process:
        out, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert out == ""
        assert "broken.gguf" in log
        assert "Traceback" not in log


def test_an_unknown_model_is_refused(invoke: Invoke) -> None:
    unknown = invoke("serve", "--model", "nope")
    assert unknown.status == 1
    assert "smollm2-135m-instruct" in unknown.err


def test_a_port_that_is_taken_is_a_sentence(tiny_llama_gguf: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = str(sock.getsockname()[1])
        with spawned("serve", "--port", port, "--model", str(tiny_llama_gguf)) as process:
            _, log = process.communicate(timeout=PATIENCE)
            assert process.returncode == 1
            assert port in log
            assert "Traceback" not in log


def test_demo_runs_from_start_to_stop(tiny_llama_gguf: Path) -> None:
    with spawned("demo", "--model", str(tiny_llama_gguf), "-n", "8", "--json", "Who mills?") as process:
        out, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        result = json.loads(out)
        assert result["finish_reason"] in ("length", "stop")
        assert 1 <= result["generated_tokens"] <= 8
        assert result["ttft_seconds"] > 0
        assert result["choices"]["back end"].startswith("native-")
        assert "blocks of 16 tokens" in result["choices"]["KV cache"]
        assert "Traceback" not in log


def test_demo_for_people(tiny_llama_gguf: Path) -> None:
    with spawned("demo", "--model", str(tiny_llama_gguf), "-n", "8") as process:
        out, log = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, log
        assert "TTFT" in out
        assert "server stopped" in out
        assert "threads" in out
