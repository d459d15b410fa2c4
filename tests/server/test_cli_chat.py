"""`headrace chat`, at a terminal and in a pipe. The engine counts; what matters is what is kept, cut and left."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from headrace.client import Client
from headrace.server.cli.chat import Conversation

from tests.server.cli_support import COMMAND, PATIENCE, Invoke, Terminal, invoke
from tests.support.live_server import LiveServer, live_server

__all__ = ["invoke"]  # a fixture


@contextmanager
def terminal(*arguments: str, cache: Path) -> Iterator[Terminal]:
    person = Terminal(["chat", *arguments], {"HEADRACE_CACHE": str(cache)})
    try:
        yield person
    finally:
        person.close()


def test_a_conversation_at_a_terminal(live_server: LiveServer, tmp_path: Path) -> None:
    with terminal("--target", live_server.target, "--temperature", "0", cache=tmp_path) as person:
        person.expect("tiny")
        person.expect("you>")
        person.type("first question\r")
        person.expect("#$%&")  # the counting engine says all of ASCII
        person.type("\x03")  # Ctrl-C: interrupts the answer ...
        person.expect("(interrupted)")
        person.expect("you>")  # ... and keeps the session
        assert live_server.stats()["calls"] == 1
        person.type("half a line\x03")  # at the prompt it clears the line
        person.expect("you>")
        person.type("/help\r")
        person.expect("/system TEXT")
        person.expect("you>")
        person.type("\x1b[A\x1b[A\r")  # history: back to the first question
        person.expect("#$%&")
        person.type("\x03")
        person.expect("(interrupted)")
        person.expect("you>")
        person.type("\x04")  # Ctrl-D
        assert person.wait() == 0
    live_server.wait_idle()
    assert "first question" in (tmp_path / "chat_history").read_text()


def test_a_lost_server_is_told_and_survived(tiny_llama_gguf: Path, tmp_path: Path) -> None:
    with (
        live_server(tiny_llama_gguf, step_seconds=0.05) as server,
        terminal("--target", server.target, "--temperature", "0", cache=tmp_path) as person,
    ):
        person.expect("you>")
        person.type("hello\r")
        person.expect("#$%&")
        server.kill()
        person.expect("error:")
        person.expect("you>")
        person.type("/quit\r")
        assert person.wait() == 0


def test_each_line_of_a_pipe_is_a_turn(invoke: Invoke, live_server: LiveServer) -> None:
    options = ("--target", live_server.target, "--temperature", "0", "-n", "6")
    with Client(live_server.target) as client:
        (answer,) = client.complete(messages=[{"role": "user", "content": "a"}], max_tokens=6, temperature=0)
    said = invoke("chat", *options, stdin="a\n\nb\n/reset\nc\n")
    assert said.status == 0
    assert said.out == f"{answer.text}\n" * 3
    assert invoke("chat", *options, stdin="a\n/quit\nb\n").out == f"{answer.text}\n"


def test_a_failure_ends_a_script(invoke: Invoke, live_server: LiveServer) -> None:
    refused = invoke("chat", "--target", live_server.target, "--top-p", "7", stdin="a\nb\n")
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.count("sampling.top_p") == 1
    assert invoke("chat", "--target", "127.0.0.1:1", stdin="a\n").status == 3
    assert invoke("chat", "--target", live_server.target, "--model", "nope", stdin="a\n").status == 1


def test_chat_needs_no_terminal() -> None:
    done = subprocess.run(
        [*COMMAND, "chat", "--target", "127.0.0.1:1"],
        input="",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 3


@pytest.fixture
def conversation(live_server: LiveServer) -> Iterator[Conversation]:
    with Client(live_server.target) as client, Conversation(client, "be brief", {"temperature": 0.0}) as conversation:
        yield conversation
    live_server.wait_idle()


def ask(conversation: Conversation, text: str, cancel_after: int = 5) -> int:
    """Asks, cancels the answer after so many chunks; returns how long the prompt was, in tokens."""
    answer = conversation.say(text)
    pieces = []
    for number, chunk in enumerate(answer):
        pieces.append(chunk.text)
        if number == cancel_after:
            answer.interrupt()
    conversation.keep("".join(pieces))
    assert answer.prompt_tokens is not None
    return answer.prompt_tokens


def test_an_interrupted_answer_stays_part_of_the_conversation(conversation: Conversation) -> None:
    lengths = [ask(conversation, "a") for _ in range(3)]
    assert lengths[1] > lengths[0] + 5
    assert lengths[2] > lengths[1] + 5


def test_reset_forgets_and_system_begins_anew(conversation: Conversation) -> None:
    first = ask(conversation, "a")
    assert ask(conversation, "a") > first
    conversation.reset()
    assert ask(conversation, "a") == first
    conversation.reset("")
    assert ask(conversation, "a") < first


def test_a_refused_turn_is_taken_back(live_server: LiveServer) -> None:
    from headrace.client import InvalidRequestError

    with Client(live_server.target) as client, Conversation(client, "", {"max_tokens": 8}) as conversation:
        first = ask(conversation, "a")
        second = ask(conversation, "b")
        refused = conversation.say("too long " * 400)
        with pytest.raises(InvalidRequestError):
            list(refused)
        conversation.forget()
        third = ask(conversation, "b")
        assert second - first == pytest.approx(third - second, abs=4)
