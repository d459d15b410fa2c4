"""The front end's side of the engine: submit a sequence, get a bounded stream of its tokens.

One `EngineClient` per life of an engine process; the supervisor makes it, servicers submit through it. A stream never
holds more than its limit plus one step: when its reader is behind, the sequence is parked in the engine and no other
notices; a reader that stays behind is cut off. Everything here runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import msgspec
from headrace.engine.types import EngineStats, FinishOutput, SequenceOutput, SequenceRequest, TokenOutput
from headrace.server import errors, frames
from headrace.server.errors import ServerError
from headrace.server.spans import Observer
from opentelemetry.context import Context

log = logging.getLogger("headrace.server")


class Taken(NamedTuple):
    """What a stream had: tokens in order, and how the sequence ended if it has."""

    tokens: list[TokenOutput]
    finish: FinishOutput | None


class Mailbox:
    """Where one RPC waits for all of its streams: a reader wakes once per engine step, however many have news."""

    def __init__(self, on_stall: Callable[[ServerError], None]) -> None:
        """on_stall: called once when a stream's reader has been behind for too long; it must make the reader stop."""
        self.on_stall = on_stall
        self._ready: dict[TokenStream, None] = {}
        self._is_woken = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None

    def notify(self, stream: TokenStream) -> None:
        """The stream has something to take."""
        self._ready[stream] = None
        self.wake()

    def wake(self) -> None:
        """End the current or the next wait, with or without news from a stream."""
        self._is_woken = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def wait(self) -> list[TokenStream]:
        """Streams with news, in the order the news came; empty where only `wake` was called. One waiter at a time."""
        if not self._is_woken:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        self._is_woken = False
        ready, self._ready = self._ready, {}
        return list(ready)


class TokenStream:
    """The tokens of one sequence on their way to one reader."""

    def __init__(self, client: EngineClient, sequence_id: int, mailbox: Mailbox) -> None:
        self.id = sequence_id
        self.trace_context: Context | None = None  # where spans about it belong; None: it has none
        self.on_start: Callable[[], None] | None = None  # called once, with its first token or its end
        self._client = client
        self._mailbox = mailbox
        self._tokens: list[TokenOutput] = []
        self._finish: FinishOutput | None = None
        self._failure: ServerError | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._holds: set[str] = set()  # why the engine is to leave the sequence alone

    @property
    def is_parked(self) -> bool:
        """Whether the engine holds the sequence back for its reader."""
        return self._stall_timer is not None

    def take(self) -> Taken:
        """Everything that has arrived since the last take, without waiting. Raises ServerError where the stream
        failed."""
        if self._failure is not None:
            raise self._failure
        taken = Taken(self._tokens, self._finish)
        self._tokens = []
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
            self._release("behind")
        return taken

    def cancel(self) -> None:
        """Stop the sequence; its end comes with a later take. Does nothing after the end."""
        if self._finish is None and self._failure is None:
            self._client.send(frames.Cancel(self.id))

    def set_max_tokens(self, max_tokens: int) -> None:
        """Change how many tokens it may generate; at or below what it has, it ends."""
        self._client.send(frames.SetMaxTokens(self.id, max_tokens))

    def set_stop_tokens(self, token_ids: Sequence[int]) -> None:
        """Change the tokens that end it, from the next one on that is chosen."""
        self._client.send(frames.SetStopTokens(self.id, tuple(token_ids)))

    def grant(self, credit: int) -> None:
        """Let it have so many tokens in all before it waits for more."""
        self._client.send(frames.Grant(self.id, credit))

    def pause(self) -> None:
        """Leave the sequence alone until `resume`, whatever its reader does. Idempotent, as is `resume`."""
        self.expect_nothing()
        self._hold("paused")

    def resume(self) -> None:
        """Go on with a paused sequence."""
        self._release("paused")

    def expect_nothing(self) -> None:
        """Its first token is not awaited any more, as far as `on_start` is concerned: it waits by its owner's wish."""
        if self.on_start is not None:
            self.on_start()
            self.on_start = None

    def nudge(self) -> None:
        """Make the reader take, although no tokens came."""
        self._mailbox.notify(self)

    def close(self) -> None:
        """The reader has gone: stop the sequence and forget it. Idempotent; call it in `finally`."""
        self.cancel()
        self._client.forget(self)
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def push(self, output: SequenceOutput) -> None:
        """A step's news, from the client."""
        self.expect_nothing()
        self._tokens += output.tokens
        if output.finish is not None:
            self._finish = output.finish
        elif len(self._tokens) >= self._client.buffer_tokens and self._stall_timer is None:
            self._hold("behind")
            loop = asyncio.get_running_loop()
            self._stall_timer = loop.call_later(self._client.stall_timeout, self._stalled)
        self._mailbox.notify(self)

    def fail(self, error: ServerError) -> None:
        """The sequence is lost."""
        self._failure = error
        self._mailbox.notify(self)

    def _hold(self, why: str) -> None:
        if not self._holds:
            self._client.send(frames.Park(self.id))
        self._holds.add(why)

    def _release(self, why: str) -> None:
        if why in self._holds:
            self._holds.discard(why)
            if not self._holds:
                self._client.send(frames.Unpark(self.id))

    def _stalled(self) -> None:
        error = ServerError(errors.SLOW_READER)
        self.close()
        self.fail(error)
        self._mailbox.on_stall(error)


class EngineClient(asyncio.Protocol):
    """One connection to one engine process."""

    _ids = itertools.count(1)  # never used twice, across engine lives too

    def __init__(
        self,
        buffer_tokens: int,
        stall_timeout: float,
        on_progress: Callable[[float], None],
        observer: Observer | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.buffer_tokens = buffer_tokens
        self.stall_timeout = stall_timeout
        self.stats = EngineStats()
        self.last_heard = loop.time()
        self.ready: asyncio.Future[frames.Ready] = loop.create_future()
        self.closed: asyncio.Future[None] = loop.create_future()
        self.load_failure: str | None = None
        self.on_stats: Callable[[EngineStats], None] | None = None  # called with every step's
        self._on_progress = on_progress
        self._observer = observer or Observer("")
        self._transport: asyncio.WriteTransport | None = None
        self._decoder = frames.front_decoder()
        self._streams: dict[int, TokenStream] = {}
        self._pings: dict[int, asyncio.Future[EngineStats]] = {}

    @property
    def num_streams(self) -> int:
        """Streams that have not been closed."""
        return len(self._streams)

    def submit(self, make_request: Callable[[int], SequenceRequest], mailbox: Mailbox) -> TokenStream:
        """Send a sequence to the engine. make_request: builds it for the id that it gets."""
        stream = TokenStream(self, next(self._ids), mailbox)
        self._streams[stream.id] = stream
        if self.closed.done():
            stream.fail(ServerError(errors.ENGINE_RESTARTED))
        else:
            request = make_request(stream.id)
            stream.trace_context = self._observer.submitted(request)
            if stream.trace_context is not None:
                request = msgspec.structs.replace(request, is_traced=True)
            self.send(frames.Submit(request))
        return stream

    def answer(self, finish: FinishOutput, mailbox: Mailbox) -> TokenStream:
        """A stream that has ended so, without the engine."""
        stream = TokenStream(self, next(self._ids), mailbox)
        stream.push(SequenceOutput(stream.id, [], finish))
        return stream

    def send(self, message: frames.ToEngine) -> None:
        """Send one frame; does nothing where the engine is gone (its streams have failed then)."""
        if self._transport is not None and not self.closed.done():
            self._transport.write(frames.encode(message))

    def forget(self, stream: TokenStream) -> None:
        """Drop a stream that nobody reads."""
        self._streams.pop(stream.id, None)

    async def ping(self) -> EngineStats:
        """The engine's statistics, fetched through its one thread. Raises ServerError where it dies meanwhile."""
        if self.closed.done():
            raise ServerError(errors.ENGINE_RESTARTED)
        nonce = next(self._ids)
        answer: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._pings[nonce] = answer
        self.send(frames.Ping(nonce))
        try:
            return await answer
        finally:
            self._pings.pop(nonce, None)

    def close(self) -> None:
        """Hang up; the engine exits."""
        if self._transport is not None:
            self._transport.close()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's are not derived from it

    def data_received(self, data: bytes) -> None:
        self.last_heard = asyncio.get_running_loop().time()
        try:
            for message in self._decoder.feed(data):
                self._receive(message)
        except frames.FrameError:
            log.exception("the engine sent what is not in the schema; hanging up")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)
        if not self.ready.done():
            self.ready.cancel()
        for stream in list(self._streams.values()):
            stream.fail(ServerError(errors.ENGINE_RESTARTED))
        for answer in self._pings.values():
            if not answer.done():
                answer.set_exception(ServerError(errors.ENGINE_RESTARTED))

    def _receive(self, message: frames.ToFront) -> None:
        if isinstance(message, frames.Step):
            self.stats = message.stats
            if self.on_stats is not None:
                self.on_stats(message.stats)
            if message.record is not None:
                self._observer.stepped(message.record)
            for output in message.outputs:
                if output.finish is not None:
                    self._observer.finished(output.id, output.finish)
                stream = self._streams.get(output.id)
                if stream is not None:
                    stream.push(output)
                    if output.finish is not None:
                        self.forget(stream)
        elif isinstance(message, frames.Pong):
            self.stats = message.stats
            answer = self._pings.get(message.nonce)
            if answer is not None and not answer.done():
                answer.set_result(message.stats)
        elif isinstance(message, frames.Refused):
            self._observer.finished(message.id, None)
            stream = self._streams.pop(message.id, None)
            if stream is not None:
                is_full = message.reason == "queue_full"
                stream.fail(errors.OverloadedError(1.0, "engine queue") if is_full else errors.new_incident())
        elif isinstance(message, frames.Loading):
            self._on_progress(message.progress)
        elif isinstance(message, frames.Ready):
            self.stats = message.stats
            if not self.ready.done():
                self.ready.set_result(message)
        else:
            self.load_failure = message.message
