"""Which event of a Session belongs to which generation: the part of a session that sync and asyncio share.

Both sessions open a route per generation, feed every response to `dispatch`, and read their own queue behind the
route. Nothing here waits or does I/O; the lock makes it safe to open routes from any thread.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import grpc
from headrace.client import convert
from headrace.client.errors import HeadraceError, error_from_session, make_error
from headrace.client.types import Chunk, Pong
from headrace.v1 import inference_pb2 as pb

_log = logging.getLogger("headrace.client")


@dataclass(frozen=True)
class Started:
    """A generation was admitted, with this many tokens of prompt."""

    prompt_tokens: int


Event = Started | Chunk | HeadraceError


def log_command_error(error: HeadraceError) -> None:
    """What a session does with a refused command that no generation is waiting for, unless told otherwise."""
    _log.warning("session command refused for %r: %s", error.generation_id, error)


class SessionRouter:
    """The open generations and pings of one session."""

    def __init__(self, on_command_error: Callable[[HeadraceError], None] | None) -> None:
        self._on_command_error = on_command_error or log_command_error
        self._routes: dict[str, Callable[[Event], None]] = {}  # where each generation's events go
        self._pings: dict[int, tuple[float, Callable[[Pong | HeadraceError], None]]] = {}
        self._ended: HeadraceError | None = None
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def open(self, generation_id: str | None, put: Callable[[Event], None]) -> str:
        """Registers a generation under its name, or under a fresh one, and returns the name.

        Raises HeadraceError: the session has ended. ValueError: the name is in use here.
        """
        with self._lock:
            self._check_open()
            name = generation_id or f"g{next(self._numbers)}"
            if name in self._routes:
                raise ValueError(f"generation {name!r} is running already")
            self._routes[name] = put
            return name

    def open_ping(self, put: Callable[[Pong | HeadraceError], None]) -> int:
        """Registers a ping and returns its nonce. Raises HeadraceError: the session has ended."""
        with self._lock:
            self._check_open()
            nonce = next(self._numbers)
            self._pings[nonce] = (time.monotonic(), put)
            return nonce

    def is_running(self, generation_id: str) -> bool:
        """Whether the generation's end has not been seen yet."""
        with self._lock:
            return generation_id in self._routes

    @property
    def has_ended(self) -> bool:
        """Whether the stream is over."""
        return self._ended is not None

    @property
    def num_running(self) -> int:
        """Generations whose end has not been seen yet."""
        with self._lock:
            return len(self._routes)

    def dispatch(self, response: pb.SessionResponse) -> None:
        """Hands one event to the generation or ping it belongs to. Events of unknown ones are dropped."""
        kind = response.WhichOneof("event")
        if kind == "started":
            self._on_started(response.started)
        elif kind == "chunk":
            self._on_chunk(response.chunk)
        elif kind == "error":
            self._on_error(error_from_session(response.error), response.error.is_final)
        elif kind == "pong":
            with self._lock:
                sent, put = self._pings.pop(response.pong.nonce, (0.0, None))
            if put is not None:
                put(Pong(time.monotonic() - sent, response.pong.engine_steps))

    def end(self, error: HeadraceError) -> None:
        """The stream is over: everything still open fails with `error`, and so does everything opened later."""
        with self._lock:
            self._ended = self._ended or error
            routes, self._routes = self._routes, {}
            pings, self._pings = self._pings, {}
        for put_event in routes.values():
            put_event(error)
        for _, put_pong in pings.values():
            put_pong(error)

    def _check_open(self) -> None:
        if self._ended is not None:
            raise make_error(self._ended.code, f"the session has ended: {self._ended.message}")

    def _on_started(self, event: pb.SessionStarted) -> None:
        with self._lock:
            put = self._routes.get(event.generation_id)
        if put is not None:
            put(Started(event.prompt_tokens))

    def _on_chunk(self, event: pb.SessionChunk) -> None:
        chunk = convert.to_chunk(event.chunk)
        with self._lock:
            put = self._routes.get(event.generation_id)
            if chunk.finish is not None:
                self._routes.pop(event.generation_id, None)
        if put is not None:
            put(chunk)

    def _on_error(self, error: HeadraceError, is_final: bool) -> None:
        with self._lock:
            put = self._routes.pop(error.generation_id, None) if is_final else None
        if put is not None:
            put(error)
        elif error.code is not grpc.StatusCode.NOT_FOUND:  # not found: the generation ended before the command came
            self._on_command_error(error)
