"""Renders chat templates in a process that can be killed; called by the front end for every chat request.

A template comes with the model and may loop for ever or ask for all memory; no limit inside our own process stops
`'x' * 10**9`. So it runs in `template_child`, one render at a time. A render that takes too long, or a child that dies,
ends in a `TemplateError`; the next render starts a new child. Callers wait their turn in order of arrival.
"""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import msgspec
from headrace.models.chat_template import MAX_OUTPUT_CHARS, ChatTemplate, MessagesRefusedError
from headrace.models.errors import TemplateError
from headrace.server.template_child import HEADER, Failed, Ready, Render, Rendered, Setup

_CHILD_MODULE = "headrace.server.template_child"
_MAX_REASON_CHARS = 300
_MAX_FRAME_EXTRA = 64 << 10

_POLL_SECONDS = 0.001

_Answer: TypeAlias = Ready | Rendered | Failed


@dataclass(frozen=True, eq=False)
class _Child:
    """A process of `template_child` and the socket that is its standard input and output."""

    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclass(frozen=True)
class TemplateLimits:
    """What one render may use."""

    render_seconds: float = 1.0
    start_seconds: float = 10.0  # starting Python and importing Jinja, about 0.2 s on an idle machine
    max_output_chars: int = MAX_OUTPUT_CHARS
    max_memory_bytes: int = 128 << 20  # on top of the child's own 25 MB


class TemplateWorker:
    """One chat template and the child that renders it. Belongs to one event loop."""

    def __init__(self, source: str, bos_token: str, eos_token: str, limits: TemplateLimits | None = None) -> None:
        """Starts nothing yet. Raises TemplateError for a template that is too large."""
        ChatTemplate(source, bos_token, eos_token)
        self._limits = limits or TemplateLimits()
        self._setup = Setup(
            source=source,
            bos_token=bos_token,
            eos_token=eos_token,
            max_output_chars=self._limits.max_output_chars,
            max_memory_bytes=self._limits.max_memory_bytes,
            max_cpu_seconds=self._limits.render_seconds,
            parent=os.getpid(),
        )
        self._turn = asyncio.Lock()
        self._child: _Child | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Starts the child ahead of the first render. Raises TemplateError if it does not start."""
        async with self._turn:
            await self._ready_child()

    async def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The prompt. Raises MessagesRefusedError or TemplateError within the limits' seconds, once it is its turn."""
        request = Render([dict(message) for message in messages], add_generation_prompt)
        async with self._turn:
            child = await self._ready_child()
            answer = await self._ask(child, request, self._limits.render_seconds)
        if isinstance(answer, Rendered):
            return answer.text
        if isinstance(answer, Ready):
            raise TemplateError("the chat template's process answered out of turn")
        kind = MessagesRefusedError if answer.is_refusal else TemplateError
        raise kind(answer.reason[:_MAX_REASON_CHARS])

    async def close(self) -> None:
        """Kills the child. A render under way, and all later ones, end in a TemplateError."""
        self._is_closed = True
        if self._child is not None:
            self._child.process.kill()
        async with self._turn:
            await self._discard()

    @property
    def process_id(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._child is None else self._child.process.pid

    async def _ready_child(self) -> _Child:
        if self._is_closed:
            raise TemplateError("the chat template's process is closed")
        if self._child is not None and self._child.process.poll() is None:
            return self._child
        await self._discard()
        try:
            self._child = await _spawn()
        except OSError as error:
            raise TemplateError("the chat template's process cannot be started") from error
        await self._ask(self._child, self._setup, self._limits.start_seconds)
        return self._child

    async def _ask(self, child: _Child, question: Setup | Render, seconds: float) -> _Answer:
        is_answered = False
        try:
            answer = await asyncio.wait_for(self._exchange(child, question), seconds)
            is_answered = True
            return answer
        except asyncio.TimeoutError:
            raise TemplateError("the chat template took too long") from None
        # RuntimeError is what uvloop raises for a write to a transport that has closed; asyncio raises an OSError.
        except (OSError, EOFError, RuntimeError, msgspec.MsgspecError) as error:
            raise TemplateError("the chat template's process died") from error
        finally:
            # Whatever went wrong, a caller that went away included: a late answer would be taken for the next one's.
            if not is_answered:
                await self._discard()

    async def _exchange(self, child: _Child, question: Setup | Render) -> _Answer:
        body = msgspec.msgpack.encode(question)
        child.writer.write(HEADER.pack(len(body)) + body)
        await child.writer.drain()
        (size,) = HEADER.unpack(await child.reader.readexactly(HEADER.size))
        if size > 4 * self._limits.max_output_chars + _MAX_FRAME_EXTRA:
            raise EOFError("the answer is larger than any the child should give")
        return cast(_Answer, msgspec.msgpack.decode(await child.reader.readexactly(size), type=_Answer))

    async def _discard(self) -> None:
        """Kills the child, if any, and waits until the system has forgotten it."""
        child, self._child = self._child, None
        if child is None:
            return
        child.process.kill()
        child.writer.close()
        while child.process.poll() is None:
            await asyncio.sleep(_POLL_SECONDS)


async def _spawn() -> _Child:
    """Popen, not the loop's own: it uses vfork, so that no fork handler of gRPC's threads ever runs (uvloop forks)."""
    near, far = socket.socketpair()
    with far:
        # A session of its own, as Ctrl-C on the terminal is for the server; and nothing of our environment.
        process = subprocess.Popen(
            [sys.executable, "-m", _CHILD_MODULE],
            stdin=far.fileno(),
            stdout=far.fileno(),
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUTF8": "1"},
            start_new_session=True,
        )
    try:
        reader, writer = await asyncio.open_unix_connection(sock=near)
    except BaseException:
        process.kill()
        process.wait()
        near.close()
        raise
    return _Child(process, reader, writer)
