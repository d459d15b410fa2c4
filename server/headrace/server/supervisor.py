"""Keeps one engine process alive: spawns it, watches it, starts a new one when it dies or hangs.

Owned by `model_host.ModelHost`. The engine (`spawn.py`) gets its socket as an inherited descriptor, and is killed by
the kernel with this process. A front end that keeps its engine dying would burn a machine for nothing: more than so
many restarts in a minute and the model is FAILED for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum

from headrace.engine.types import EngineStats
from headrace.server import frames
from headrace.server.config import ServerConfig
from headrace.server.engine_client import EngineClient
from headrace.server.spans import Observer
from headrace.server.spawn import ENGINE_COMMAND, SpawnedEngine, spawn_engine

log = logging.getLogger("headrace.server")

_DYING_SECONDS = 0.2  # for one that was not ready
_EXIT_SECONDS = 2.0  # for an engine that was hung up on; then it is killed
_DUMP_SECONDS = 1.0  # for a hung engine to write its stacks
_FIRST_BACKOFF = 0.1
_POLL_SECONDS = 0.005
_LONG_STEPS = 20


class EngineState(Enum):
    """What the supervisor is at."""

    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"
    STOPPED = "stopped"


class Supervisor:
    """Runs engine lives one after the other. `client` is the present one's, None while there is none that answers."""

    def __init__(
        self,
        config: ServerConfig,
        on_change: Callable[[], None],
        command: Sequence[str] = ENGINE_COMMAND,
        first: SpawnedEngine | None = None,
    ) -> None:
        """on_change: called on the event loop after every change of `state`, `client` or `progress`. first: the engine
        of the first life, spawned already; ours from now on."""
        self.state = EngineState.LOADING
        self.failure = ""  # why it has FAILED; for the operator, never for a client
        self.client: EngineClient | None = None
        self.ready: frames.Ready | None = None
        self.progress = 0.0
        self.is_stalled = False  # the engine has been silent for longer than its steps explain
        self.pid: int | None = None
        self.on_stats: Callable[[EngineStats], None] | None = None  # called with every step's
        self.num_restarts = 0
        self._config = config
        self._on_change = on_change
        self._command = tuple(command)
        self._first = first
        self._deaths: deque[float] = deque()

    async def run(self, load: frames.Load) -> None:
        """Keep an engine running until cancelled, or until it has FAILED."""
        loop = asyncio.get_running_loop()
        backoff = _FIRST_BACKOFF
        try:
            while True:
                self._set(EngineState.LOADING)
                started = loop.time()
                failure = await self._live(load)
                if failure is not None:
                    self.failure = failure
                    break
                now = loop.time()
                self._deaths.append(now)
                while self._deaths[0] < now - 60:
                    self._deaths.popleft()
                if len(self._deaths) > self._config.max_restarts_per_minute:
                    self.failure = f"the engine died {len(self._deaths)} times in a minute"
                    break
                self.num_restarts += 1
                backoff = _FIRST_BACKOFF if now - started > 60 else min(backoff * 2, self._config.max_backoff)
                self._set(EngineState.LOADING)
                await asyncio.sleep(backoff)
            log.error("the model cannot be run: %s", self.failure)
            self._set(EngineState.FAILED)
        except asyncio.CancelledError:
            self._set(EngineState.STOPPED)
            raise

    async def _live(self, load: frames.Load) -> str | None:
        """One life of an engine, from spawn to its end. Returns why the model can never be loaded, or None."""
        config = self._config
        is_ready = False
        observer = Observer(config.name)
        client = EngineClient(config.stream_buffer_tokens, config.stall_timeout, self._progressed, observer)
        client.on_stats = self.on_stats
        engine, self._first = self._first, None
        if engine is None:
            engine = spawn_engine(self._command)
        process = engine.process
        try:
            self.pid = process.pid
            await asyncio.get_running_loop().create_unix_connection(lambda: client, sock=engine.socket)
            client.send(load)
            # A wait, not an await: the futures belong to the client, which settles them whatever happens to us.
            await asyncio.wait((client.ready, client.closed), return_when=asyncio.FIRST_COMPLETED)
            if client.ready.done() and not client.ready.cancelled():
                self.ready = client.ready.result()
                is_ready = True
                self.client = client
                self._set(EngineState.READY)
                log.info("engine %d is ready (%s)", process.pid, self.ready.backend)
                await self._watch(client, process)
            return client.load_failure
        finally:
            self.client = None
            self.pid = None
            self.progress = 0.0
            client.close()
            engine.socket.close()
            # One that is still loading does not look at its socket; one that steps does.
            await _end(process, _EXIT_SECONDS if is_ready else _DYING_SECONDS)

    async def _watch(self, client: EngineClient, process: subprocess.Popen[bytes]) -> None:
        """Until the engine's end of the socket closes; an engine that says nothing for too long is killed."""
        loop = asyncio.get_running_loop()
        hang_timeout, progress_timeout = self._config.hang_timeout, self._config.progress_timeout
        client.last_heard = loop.time()
        while not client.closed.done():
            client.send(frames.Ping(0))
            await asyncio.wait((client.closed,), timeout=min(1.0, hang_timeout / 4, progress_timeout / 4))
            # A long step is no stall: the steps of late say what is long.
            patience = max(progress_timeout, _LONG_STEPS * client.stats.token_seconds)
            self._set_stalled(not client.closed.done() and loop.time() - client.last_heard > patience)
            if not client.closed.done() and loop.time() - client.last_heard > hang_timeout:
                log.error("engine %d has been silent for %.1f s; killing it", process.pid, hang_timeout)
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGABRT)
                await asyncio.wait((client.closed,), timeout=_DUMP_SECONDS)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await asyncio.wait((client.closed,))
        self.client = None
        self._set_stalled(False)
        self._set(EngineState.LOADING)  # at once, before the process is reaped

    def _set_stalled(self, is_stalled: bool) -> None:
        if is_stalled != self.is_stalled:
            self.is_stalled = is_stalled
            log.warning("the engine makes no progress" if is_stalled else "the engine makes progress again")
            self._on_change()

    def _progressed(self, progress: float) -> None:
        self.progress = progress
        self._on_change()

    def _set(self, state: EngineState) -> None:
        self.state = state
        self._on_change()


async def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Reap a process whose socket is closed; kill it where it takes too long. Never leaves it behind."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + patience
    try:
        while process.poll() is None and loop.time() < limit:
            await asyncio.sleep(_POLL_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()  # the kernel does not keep us waiting
    if process.returncode:
        log.warning("engine %d ended with status %d", process.pid, process.returncode)
