"""The commands that need no model of their own: help, completion, generate, models, pull, doctor, bench; failures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from headrace.client import Client
from headrace.server.cli import output

from tests.server.cli_support import COMMAND, Invoke, invoke
from tests.support.live_server import LONG, LiveServer

__all__ = ["invoke"]  # a fixture

COMMANDS = ("serve", "demo", "generate", "chat", "replay", "bench", "models", "pull", "doctor")


def test_help_names_every_command_and_teaches(invoke: Invoke) -> None:
    shown = invoke("--help")
    assert shown.status == 0
    assert all(command in shown.out for command in COMMANDS)
    for command in COMMANDS:
        own = invoke(command, "--help")
        assert own.status == 0
        assert command == "doctor" or f"headrace {command}" in own.out, f"{command} --help has no example"


def test_the_command_starts_without_what_it_does_not_need() -> None:
    code = (
        "import sys; sys.argv = ['headrace', '--help']; from headrace.server.cli import main; assert main() == 0;"
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert not loaded & {
        "torch",
        "numpy",
        "grpc",
        "google",
        "tokenizers",
        "psutil",
        "prompt_toolkit",
        "huggingface_hub",
    }


def test_commands_never_import_torch(live_server: LiveServer) -> None:
    target = live_server.target
    code = (
        "import sys; from headrace.server.cli import main\n"
        f"for line in ('models', 'doctor --json', 'models -t {target}', 'generate x -n 1 -t {target}'):\n"
        "    sys.argv = ['headrace', *line.split()]\n"
        "    assert main() == 0, line\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(invoke: Invoke) -> None:
    assert invoke("--version").out.startswith("headrace ")


def test_tab_completes() -> None:
    environment = {"_HEADRACE_COMPLETE": "complete_bash", "COMP_WORDS": "headrace ser", "COMP_CWORD": "1"}
    program = Path(sys.executable).parent / "headrace"
    done = subprocess.run([program], env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["serve"]


def test_generate_streams_what_complete_answers(invoke: Invoke, live_server: LiveServer) -> None:
    with Client(live_server.target) as client:
        (expected,) = client.complete("water", max_tokens=20, temperature=0)
    options = ("--target", live_server.target, "-n", "20", "--temperature", "0")
    assert invoke("generate", "water", *options).out == expected.text
    assert invoke("generate", *options, stdin="water\n").out == expected.text
    assert invoke("generate", "-", *options, stdin="water").out == expected.text
    answer = json.loads(invoke("generate", "water", "--json", *options).out)
    assert answer["text"] == expected.text
    assert answer["finish"]["usage"]["generated_tokens"] == 20


def test_generate_as_chat(invoke: Invoke, live_server: LiveServer) -> None:
    options = ("--target", live_server.target, "-n", "2", "--json")
    plain = json.loads(invoke("generate", "water", *options).out)
    chat = json.loads(invoke("generate", "--chat", "water", *options).out)
    system = json.loads(invoke("generate", "--system", "be brief", "water", *options).out)
    lengths = [answer["finish"]["usage"]["prompt_tokens"] for answer in (plain, chat, system)]
    assert lengths == sorted(set(lengths))


def test_the_target_comes_from_the_environment(
    invoke: Invoke, live_server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_TARGET", live_server.target)
    assert invoke("generate", "x", "-n", "1").status == 0


def test_a_missing_prompt_is_wrong_usage(invoke: Invoke) -> None:
    empty = invoke("generate", stdin="")
    assert empty.status == 2
    assert "standard input is empty" in empty.err


def test_the_reader_may_leave(live_server: LiveServer) -> None:
    since = live_server.steps()
    command = [*COMMAND, "generate", "x", "-n", str(LONG), "--temperature", "0", "-t", live_server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
    live_server.wait_freed(since)


def test_ctrl_c_ends_a_stream_and_frees_the_servers_work(live_server: LiveServer) -> None:
    since = live_server.steps()
    command = [*COMMAND, "generate", "x", "-n", str(LONG), "--temperature", "0", "-t", live_server.target]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
        assert process.wait() == 130
    live_server.wait_freed(since)


def test_failures_are_a_sentence_and_a_status(invoke: Invoke, live_server: LiveServer) -> None:
    target = ("--target", live_server.target)
    nobody = invoke("generate", "x", "--target", "127.0.0.1:1")
    assert (nobody.status, nobody.out) == (3, "")
    assert "no server answers there" in nobody.err
    assert "headrace serve" in nobody.err
    refused = invoke("generate", "x", "--top-p", "7", *target)
    assert refused.status == 1
    assert "sampling.top_p" in refused.err
    unknown = invoke("generate", "x", "--model", "nope", *target)
    assert unknown.status == 1
    assert "MODEL_NOT_FOUND" in unknown.err
    slow = invoke("generate", "x", "-n", "400", "--temperature", "0", "--timeout", "0.1", *target)
    assert slow.status == 3
    assert "DEADLINE_EXCEEDED" in slow.err
    for wrong in (("generate", "--nope"), ("nope",), ("generate", "x", "-n", "0")):
        assert invoke(*wrong).status == 2


def test_models_lists_catalogue_cache_and_server(invoke: Invoke, live_server: LiveServer) -> None:
    known = json.loads(invoke("models", "--json").out)
    assert [row["spec"] for row in known["known"] if row["is_default"]] == ["smollm2-135m-instruct"]
    assert known["served"] is None
    served = json.loads(invoke("models", "--json", "--target", live_server.target).out)["served"]
    assert [(model["name"], model["state"]) for model in served] == [("tiny", "ready")]
    shown = invoke("models", "--target", live_server.target).out
    assert "smollm2-135m-instruct" in shown
    assert "tiny" in shown
    assert invoke("models", "--target", "127.0.0.1:1").status == 3


def test_an_empty_cache_says_how_to_fill_it(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "headrace pull smollm2-135m-instruct" in invoke("models").out
    assert "headrace pull" in invoke("doctor").out
    assert json.loads(invoke("doctor", "--json").out)["cache"] == {"path": str(tmp_path), "models": []}


def test_pull_checks_what_is_there(invoke: Invoke, smollm2_path: Path, tiny_llama_gguf: Path) -> None:
    assert json.loads(invoke("pull", "--json").out) == {"spec": "smollm2-135m-instruct", "path": str(smollm2_path)}
    assert str(tiny_llama_gguf) in invoke("pull", str(tiny_llama_gguf)).out
    unknown = invoke("pull", "smolm2-135m-instruct")
    assert unknown.status == 1
    assert "did you mean smollm2-135m-instruct?" in unknown.err


def test_doctor_says_what_would_run_and_why(invoke: Invoke) -> None:
    report = json.loads(invoke("doctor", "--json").out)
    assert report["machine"]["logical_cores"] == os.cpu_count()
    assert 1 <= report["threads"]["chosen"] <= report["machine"]["logical_cores"]
    (chosen,) = [backend for backend in report["backends"] if backend["is_chosen"]]
    assert chosen["is_available"]
    assert all(backend["why"] for backend in report["backends"])
    assert {"python", "headrace", "grpcio", "torch"} <= report["versions"].keys()
    shown = invoke("doctor").out
    assert report["machine"]["cpu"] in shown
    assert report["threads"]["why"] in shown


def test_bench_measures_a_server(invoke: Invoke, live_server: LiveServer) -> None:
    options = (
        "--target",
        live_server.target,
        "--requests",
        "6",
        "--prompt-tokens",
        "uniform:2,9",
        "--output-tokens",
        "5",
    )
    result = json.loads(invoke("bench", *options, "--concurrency", "2", "--slo-ttft-ms", "60000", "--json").out)
    summary = result["summary"]
    assert (summary["num_requests"], summary["num_failed"], summary["output_tokens"]) == (6, 0, 30)
    assert summary["ttft_ms"]["p50"] > 0
    assert summary["itl_ms"]["p50"] >= 5  # milliseconds: half a step; two messages may come together
    assert summary["goodput_per_second"] == summary["requests_per_second"]
    shown = invoke("bench", *options, "--rate", "200").out
    assert "6 requests at 200/s (poisson)" in shown
    assert "TTFT" in shown


def test_bench_refuses_nonsense_and_tells_total_failure(invoke: Invoke, live_server: LiveServer) -> None:
    assert invoke("bench", "--prompt-tokens", "gauss:1,2").status == 2
    too_long = invoke("bench", "--target", live_server.target, "--requests", "2", "--prompt-tokens", "500")
    assert too_long.status == 1
    assert "2 PROMPT_TOO_LONG" in too_long.out
    assert "every request failed" in too_long.err


@pytest.mark.parametrize(("inside", "shown"), [(True, "bin/headrace"), (False, "/opt/x/bin/headrace")])
def test_hints_can_be_typed_where_headrace_is_not_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, inside: bool, shown: str
) -> None:
    """`make serve` runs the command in a virtual environment that nobody has activated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "bin" / "headrace") if inside else "/opt/x/bin/headrace", "serve"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert output.program() == shown
    found = tmp_path / "headrace"
    found.write_text("#!/bin/sh\n")
    found.chmod(0o755)
    assert output.program() == "headrace"
