"""The engine process: loads the model, then steps the engine for the front end at the other end of a socket.

`supervisor` spawns it as `python -m headrace.server.engine_main --fd N --parent PID`. One thread owns everything.
Between steps it takes what has arrived without waiting; with no work it sleeps in select. It ends when the socket ends,
and asks the kernel to be killed with its parent: an engine never outlives its front end.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

from headrace.engine.errors import InvalidSequenceError, QueueFullError
from headrace.models.errors import ModelError
from headrace.server import frames
from headrace.server.engine_build import Built, build_engine

log = logging.getLogger("headrace.engine")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_READ_BYTES = 1 << 18


Build = Callable[[frames.Load, Callable[[float], None]], Built]


class FrontEndGoneError(Exception):
    """The other end of the socket is closed."""


def main() -> None:
    """Entry point of the process."""
    parser = argparse.ArgumentParser(description="The engine process of a Headrace server; started by the server only.")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    sys.exit(run(arguments.fd, arguments.parent, build_engine))


def run(fd: int, parent: int, build: Build) -> int:
    """Serve the socket `fd` until it ends; returns the process's exit status."""
    _die_with(parent)
    faulthandler.enable()  # the watchdog's SIGABRT writes the stacks to the log
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold prompts
    # Ctrl-C in a terminal and some supervisors' SIGTERM reach the whole group; the front end drains, and hangs up then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    link = Link(socket.socket(fileno=fd))
    try:
        built = _load(link, build)
        if built is None:
            return 2
        EngineLoop(link, built).run()
    except FrontEndGoneError:
        return 0
    except frames.FrameError:
        log.exception("the front end sent what is not in the schema")
        return 3
    except Exception:
        log.exception("the engine failed")
        return 1
    return 0


class Link:
    """The socket to the front end, with blocking sends and receives that wait only where told to."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._sock.setblocking(True)
        self._decoder = frames.engine_decoder()

    def send(self, message: frames.ToFront) -> None:
        """Send one frame. Waits while the front end is behind."""
        try:
            self._sock.sendall(frames.encode(message))
        except OSError as error:
            raise FrontEndGoneError from error

    def receive(self, wait_seconds: float | None) -> list[frames.ToEngine]:
        """Everything that has arrived, after waiting this long (None: for ever) for the first of it."""
        messages: list[frames.ToEngine] = []
        while True:
            ready, _, _ = select.select([self._sock], [], [], 0 if messages else wait_seconds)
            if not ready:
                return messages
            wait_seconds = 0
            try:
                data = self._sock.recv(_READ_BYTES)
            except OSError as error:
                raise FrontEndGoneError from error
            if not data:
                raise FrontEndGoneError
            messages += self._decoder.feed(data)


class EngineLoop:
    """Takes commands, steps, answers: the life of the process after loading."""

    def __init__(self, link: Link, built: Built) -> None:
        self._link = link
        self._engine = built.engine

    def run(self) -> None:
        """Until the front end goes away (FrontEndGoneError)."""
        engine = self._engine
        while True:
            for message in self._link.receive(self._wait_seconds()):
                self._carry_out(message)
            before = engine.last_step
            outputs = engine.step()
            record = engine.last_step if engine.last_step is not before else None
            if outputs or record is not None:
                self._link.send(frames.Step(outputs, engine.stats(), record))

    def _wait_seconds(self) -> float | None:
        """How long to wait for commands: not at all with work to do, else until a parked sequence's deadline."""
        if self._engine.has_work():
            return 0.0
        deadline = self._engine.next_deadline()
        return None if deadline is None else max(0.0, deadline - time.monotonic())

    def _carry_out(self, message: frames.ToEngine) -> None:
        engine = self._engine
        if isinstance(message, frames.Submit):
            try:
                engine.add(message.request)
            except QueueFullError:
                self._link.send(frames.Refused(message.request.id, "queue_full"))
            except InvalidSequenceError:
                log.exception("sequence %d is not valid", message.request.id)
                self._link.send(frames.Refused(message.request.id, "invalid"))
        elif isinstance(message, frames.Cancel):
            engine.cancel(message.id)
        elif isinstance(message, frames.SetMaxTokens):
            try:
                engine.set_max_tokens(message.id, message.max_tokens)
            except InvalidSequenceError:
                log.exception("sequence %d cannot have %d tokens", message.id, message.max_tokens)
        elif isinstance(message, frames.SetStopTokens):
            try:
                engine.set_stop_tokens(message.id, message.token_ids)
            except InvalidSequenceError:
                log.exception("sequence %d cannot have these stop tokens", message.id)
        elif isinstance(message, frames.Grant):
            engine.grant(message.id, message.credit)
        elif isinstance(message, frames.Unpin):
            engine.unpin(message.conversation)
        elif isinstance(message, frames.Park):
            engine.park(message.id)
        elif isinstance(message, frames.Unpark):
            engine.unpark(message.id)
        elif isinstance(message, frames.Ping):
            self._link.send(frames.Pong(message.nonce, engine.stats()))
        else:
            raise frames.FrameError("a second load frame")


def _load(link: Link, build: Build) -> Built | None:
    """Wait for the Load frame and obey it. None: it could not be loaded, and the front end was told."""
    first, *rest = link.receive(None)
    if not isinstance(first, frames.Load) or rest:
        raise frames.FrameError("the first frame is not a load frame")
    try:
        built = build(first, lambda progress: link.send(frames.Loading(float(progress))))
    except FrontEndGoneError:
        raise
    except ModelError as error:  # foreseen: the front end logs the sentence, and nobody needs a traceback
        link.send(frames.LoadFailed(str(error)))
        return None
    except Exception as error:
        log.exception("the model could not be loaded")
        link.send(frames.LoadFailed(str(error) or type(error).__name__))
        return None
    config = built.engine.config
    link.send(
        frames.Ready(
            built.backend,
            built.num_threads,
            built.max_model_len,
            built.engine.stats(),
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            arithmetic=built.arithmetic,
        )
    )
    return built


def _die_with(parent: int) -> None:
    """Be killed when the front end dies, however it dies; the socket's end alone is not seen during a long step."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call above
        sys.exit(0)


if __name__ == "__main__":
    main()
