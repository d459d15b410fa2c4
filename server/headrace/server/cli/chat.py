"""`headrace chat`: a conversation on the bidirectional Session call.

The conversation is kept by the server (its KV blocks stay cached); each line appends a turn. The turns are kept here
too, so that a server that restarts costs a reconnect and not the conversation.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from headrace.server.cli import options, output

if TYPE_CHECKING:
    from types import FrameType

    from headrace.client import Client, Message, Sampling, Session, SessionGeneration

_HELP = """/reset        forget the conversation and begin anew
/system TEXT  begin anew with these instructions
/help         this list
/quit         leave (as does Ctrl-D); Ctrl-C interrupts an answer: the conversation goes on from there"""


def chat(
    system: options.System = "",
    target: options.Target = options.DEFAULT_TARGET,
    model: options.ServedModel = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = 0.3,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
) -> None:
    """Talk with a model. Ctrl-C interrupts the answer, Ctrl-D leaves, **/help** lists the commands.

    - **headrace chat --system "Answer in one sentence."**

    - **printf 'My name is Ada.\\nWhat is my name?\\n' | headrace chat** (each line is a turn)
    """
    from headrace.client import Client

    sampling = options.make_sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
    )
    is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with Client(target, model=model) as client:
        # Also says at once, and not after the first question, that nobody is there or that the model is unknown.
        name = client.get_model(timeout=10.0).name
        conversation = Conversation(client, system, sampling)
        with conversation:
            if is_interactive:
                output.console().print(f"[bold]{name}[/] on {target} [dim](/help lists commands, Ctrl-D leaves)[/]")
            for line in _read_lines(is_interactive):
                if line.startswith("/"):
                    if not _obey(line, conversation):
                        break
                elif line:
                    _answer(conversation, line, is_interactive)


class Conversation:
    """A conversation that survives interrupted answers, refused turns and lost connections."""

    def __init__(self, client: Client, system: str, sampling: Sampling) -> None:
        self._client = client
        self._sampling = sampling
        self._names = (f"chat-{number}" for number in itertools.count(1))
        self._session: Session | None = None
        self._kept_as = ""  # the server's name for the conversation; empty: it knows nothing (any more)
        self._turns: list[Message] = []
        self.reset(system)

    def reset(self, system: str | None = None) -> None:
        """Begins anew, with new instructions where they are given."""
        from headrace.client import Message

        if system is not None:
            self._system = system
        self._turns = [Message("system", self._system)] if self._system else []
        self._kept_as = ""

    def say(self, text: str) -> SessionGeneration:
        """Sends a turn and returns its answer, to be iterated to its end and then given to `keep` or `forget`."""
        from headrace.client import Message

        if self._session is None or self._session.has_ended:
            self._session = self._client.session()
            self._kept_as = ""
        self._turns.append(Message("user", text))
        if self._kept_as:
            return self._session.append(self._kept_as, text)
        self._kept_as = next(self._names)
        return self._session.start(messages=self._turns, conversation=self._kept_as, **self._sampling)

    def keep(self, answer: str) -> None:
        """The answer became part of the conversation."""
        from headrace.client import Message

        self._turns.append(Message("assistant", answer))

    def forget(self) -> None:
        """The last turn failed: take it back. The next turn sends the whole conversation afresh."""
        self._turns.pop()
        self._kept_as = ""

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            self._session.close()


def _read_lines(is_interactive: bool) -> Iterator[str]:
    """The user's lines: with editing, history and completion on a terminal, plainly from a pipe."""
    if not is_interactive:
        for line in sys.stdin:
            yield line.strip()
        return
    from headrace.models.sources import cache_root
    from prompt_toolkit import PromptSession
    from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory

    history = cache_root() / "chat_history"
    history.parent.mkdir(parents=True, exist_ok=True)
    prompt: PromptSession[str] = PromptSession(
        history=FileHistory(str(history)),
        auto_suggest=AutoSuggestFromHistory(),
        completer=WordCompleter(["/reset", "/system", "/help", "/quit"], sentence=True),
    )
    while True:
        with suppress(KeyboardInterrupt):  # Ctrl-C clears the line
            try:
                line = prompt.prompt("you> ")
            except EOFError:
                return
            yield line.strip()


def _obey(line: str, conversation: Conversation) -> bool:
    """Carries out a slash command; False: leave."""
    command, _, rest = line.partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.reset(rest.strip())
    else:
        print(_HELP)
    return True


def _answer(conversation: Conversation, line: str, is_interactive: bool) -> None:
    """Streams the answer to one line. A failure ends a script, but not a conversation with a person."""
    from headrace.client import HeadraceError

    pieces: list[str] = []
    try:
        answer = conversation.say(line)
        with _on_interrupt(answer.interrupt):
            for chunk in answer:
                pieces.append(chunk.text)
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
                if chunk.finish is not None and chunk.finish.reason in ("interrupted", "length"):
                    note = "interrupted" if chunk.finish.reason == "interrupted" else "cut at the limit of tokens"
                    output.notes().print(f"[dim] ({note})[/]", end="" if is_interactive else "\n")
    except HeadraceError as error:
        conversation.forget()
        if not is_interactive:
            raise
        output.explain(error)
        return
    print(flush=True)
    conversation.keep("".join(pieces))


@contextmanager
def _on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """While this holds, Ctrl-C calls `action` instead of raising: no chunk that is being read gets lost."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        action()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
