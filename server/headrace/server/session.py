"""Session: many generations multiplexed on one bidirectional stream.

One task reads commands and carries them out in order; the handler's own task is the only writer. Failures of a command
or a generation are events, the stream goes on. A `Conversation` (conversation.py) keeps what is needed to go on with a
chat. An open session takes no place in the admission; its generations do. One in which nothing runs and nothing is
asked for ends after a while, and does not hold up a drain.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace

from headrace.server import convert, errors, frames, metrics, validate
from headrace.server.admission import Admission, RequestGuard
from headrace.server.config import ServerConfig
from headrace.server.conversation import Conversation
from headrace.server.engine_client import Mailbox, TokenStream
from headrace.server.errors import InvalidRequestError, ServerError, Violation
from headrace.server.generation import ExpiredError, Generation
from headrace.server.model_host import ModelHost
from headrace.server.rpc import Call, ClientGoneError
from headrace.server.starter import Start, Starter
from headrace.v1 import inference_pb2 as pb

# Events that wait for the writer before the reader stops taking commands: a client that sends and never reads.
_MAX_WAITING_EVENTS = 64


@dataclass
class _Entry:
    """A generation of this session."""

    id: str
    generation: Generation
    guard: RequestGuard
    conversation: Conversation | None
    num_granted: int | None  # tokens that it may send in all; None: as many as it likes

    @property
    def stream(self) -> TokenStream:
        assert self.generation.stream is not None
        return self.generation.stream

    def close(self) -> None:
        """Idempotent."""
        self.generation.close()
        self.guard.close()


class SessionService:
    """The Session method; one `Session` per stream."""

    def __init__(self, host: ModelHost, admission: Admission, starter: Starter, config: ServerConfig) -> None:
        self._host = host
        self._admission = admission
        self._starter = starter
        self._config = config

    async def __call__(self, requests: AsyncIterator[pb.SessionRequest], call: Call) -> None:
        """Serve one stream."""
        self._host.client()  # raises while the model cannot answer: refused before initial metadata
        with self._admission.open(0):
            await call.admit()
            session = Session(call, self._host, self._admission, self._starter, self._config)
            self._admission.on_drain.add(session.wake)
            try:
                await session.run(requests)
            finally:
                self._admission.on_drain.discard(session.wake)
                session.close()


class Session:
    """The state of one stream."""

    def __init__(
        self, call: Call, host: ModelHost, admission: Admission, starter: Starter, config: ServerConfig
    ) -> None:
        self._call = call
        self._host = host
        self._admission = admission
        self._starter = starter
        self._config = config
        self._mailbox = Mailbox(call.interrupt)
        self._entries: dict[str, _Entry] = {}
        self._by_stream: dict[TokenStream, _Entry] = {}
        self._conversations: dict[str, Conversation] = {}
        self._events: deque[pb.SessionResponse] = deque()
        self._has_room = asyncio.Event()
        self._num_started = 0
        self._num_tokens = 0
        self._is_carrying_out = False
        self._last_active = time.monotonic()
        self._is_idle = False

    async def run(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        """Until the client has half-closed and everything has ended; or, draining, until everything has ended."""
        reader = asyncio.ensure_future(self._read(requests))
        reader.add_done_callback(lambda _: self.wake())
        watch = asyncio.ensure_future(self._watch_idleness())
        try:
            while not (reader.done() and not self._entries and not self._events):
                if self._admission.is_draining and not self._entries and not self._events:
                    raise ServerError(errors.DRAINING)
                if self._is_idle:
                    raise ServerError(errors.SESSION_IDLE)
                ready = await self._mailbox.wait()
                await self._write_events()
                for stream in ready:
                    entry = self._by_stream.get(stream)
                    if entry is not None:
                        await self._write_news(entry)
                await self._write_events()
            await reader  # its exceptions
        finally:
            watch.cancel()
            reader.cancel()
            with contextlib.suppress(asyncio.CancelledError, ClientGoneError, ServerError):
                await reader

    def wake(self) -> None:
        """Look at the state of things again."""
        self._mailbox.wake()

    def close(self) -> None:
        """Stop everything that runs and give it back."""
        for entry in self._entries.values():
            entry.close()
        for conversation in self._conversations.values():
            self._unpin(conversation)
        self._call.facts.update(model=self._host.name, operation="session", generations=self._num_started)
        self._call.facts["generated_tokens"] = self._num_tokens

    async def _watch_idleness(self) -> None:
        """Looks up rarely and costs nothing meanwhile: a command or an ending only notes its time."""
        timeout = self._config.session_idle_timeout
        remaining = timeout
        while timeout:
            await asyncio.sleep(remaining)
            is_at_work = self._entries or self._events or self._is_carrying_out
            remaining = timeout if is_at_work else self._last_active + timeout - time.monotonic()
            if remaining <= 0.0:
                self._is_idle = True
                self.wake()
                return

    # ---- the writer ----

    async def _write_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            self._has_room.set()
            await self._call.write(event)

    async def _write_news(self, entry: _Entry) -> None:
        try:
            news = entry.generation.take()
        except ServerError as error:
            self._fail(entry, error)
            return
        except ExpiredError:
            self._fail(entry, ServerError(errors.TIME_LIMIT))
            return
        if news is None:
            return
        self._num_tokens += len(news.tokens)
        if entry.conversation is not None:
            entry.conversation.hear(news)
        if news.ending is not None:
            self._remove(entry)
        chunk = convert.chunk(0, news)
        await self._call.write(pb.SessionResponse(chunk=pb.SessionChunk(generation_id=entry.id, chunk=chunk)))

    def _fail(self, entry: _Entry, error: ServerError) -> None:
        if entry.conversation is not None and not entry.conversation.roll_back():
            self._conversations = {k: c for k, c in self._conversations.items() if c is not entry.conversation}
            self._unpin(entry.conversation)
        self._remove(entry)
        self._emit(convert.session_error(entry.id, error, is_final=True))

    def _remove(self, entry: _Entry) -> None:
        entry.close()
        self._last_active = time.monotonic()
        del self._entries[entry.id]
        del self._by_stream[entry.stream]

    def _unpin(self, conversation: Conversation) -> None:
        """Nobody comes back to it; the prefix cache may keep it like anything else."""
        with contextlib.suppress(ServerError):  # an engine that is gone keeps nothing
            self._host.client().send(frames.Unpin(conversation.key))

    def _emit(self, event: pb.SessionResponse) -> None:
        self._events.append(event)
        self.wake()

    # ---- the reader ----

    async def _read(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        async for request in requests:
            command = request.WhichOneof("command")
            generation_id = getattr(getattr(request, command), "generation_id", "") if command else ""
            self._is_carrying_out = True
            try:
                await self._carry_out(request, command)
            except ServerError as error:
                metrics.refused(error.kind)
                self._emit(convert.session_error(generation_id, error, is_final=generation_id not in self._entries))
            finally:
                self._is_carrying_out = False
                self._last_active = time.monotonic()
            while len(self._events) >= _MAX_WAITING_EVENTS:
                self._has_room.clear()
                await self._has_room.wait()

    async def _carry_out(self, request: pb.SessionRequest, command: str | None) -> None:
        if command == "start":
            await self._start(request.start)
        elif command == "append":
            await self._append(request.append)
        elif command == "update":
            self._update(request.update)
        elif command == "interrupt":
            self._interrupt(request.interrupt)
        elif command == "credit":
            self._credit(request.credit)
        elif command == "cancel":
            self._target(request.cancel, command).stream.cancel()
        elif command == "pause":
            self._target(request.pause, command).stream.pause()
        elif command == "resume":
            self._target(request.resume, command).stream.resume()
        elif command == "ping":
            stats = await self._host.client().ping()
            self._emit(pb.SessionResponse(pong=pb.SessionPong(nonce=request.ping.nonce, engine_steps=stats.num_steps)))
        else:
            raise InvalidRequestError([Violation("command", "must be set", "REQUIRED")])

    async def _start(self, command: pb.SessionStart) -> None:
        request = command.request
        validate.check_model(request.model, self._host.name)
        validate.session_start(command, self._host.limits())
        self._check_new(command.generation_id)
        if command.conversation_id in self._conversations:
            raise ServerError(errors.CONVERSATION_EXISTS)
        if command.conversation_id and len(self._conversations) >= self._config.max_conversations_per_session:
            raise ServerError(errors.SESSION_FULL, quota="conversations")
        deadline = self._deadline()
        with self._guarded(request.priority, deadline) as guard:
            prepared = await self._host.prompts().prepare(request.prompt, "start.request.prompt")
            conversation = None
            if command.conversation_id:
                conversation = Conversation(self._host.prompts(), self._host.front().tokenizer, request)
                messages = self._host.prompts().messages(request.prompt.chat.messages)
                conversation.ask(conversation.first(messages, prepared))
            start = Start(prepared.ids, request.sampling, request.cache_salt, deadline, "start.request.")
            self._launch(command, start, guard, conversation)
        if conversation is not None:
            self._conversations[command.conversation_id] = conversation

    async def _append(self, command: pb.SessionAppend) -> None:
        validate.session_append(command, self._host.limits())
        self._check_new(command.generation_id)
        conversation = self._conversations.get(command.conversation_id)
        if conversation is None:
            raise ServerError(errors.CONVERSATION_NOT_FOUND)
        if conversation.is_busy:
            raise ServerError(errors.CONVERSATION_BUSY)
        sampling = command.sampling if command.HasField("sampling") else conversation.sampling
        deadline = self._deadline()
        with self._guarded(conversation.priority, deadline) as guard:
            messages = self._host.prompts().messages(command.messages)
            turn = await conversation.continuation(messages, "append.messages")
            start = Start(turn.prompt.ids, sampling, conversation.salt, deadline, "append.")
            conversation.ask(turn)
            try:
                self._launch(command, start, guard, conversation)
            except ServerError:
                conversation.roll_back()
                raise

    def _update(self, command: pb.SessionUpdate) -> None:
        validate.session_update(command, self._host.limits())
        entry = self._entry(command.generation_id)
        generation = entry.generation
        if command.HasField("max_tokens"):
            room = self._host.limits().context_length - generation.num_prompt_tokens
            if command.max_tokens > room:
                violation = Violation("update.max_tokens", f"must be at most {room} for this prompt", "OUT_OF_RANGE")
                raise InvalidRequestError([violation])
            if command.max_tokens > generation.max_tokens:
                entry.guard.reserve_tokens(command.max_tokens - generation.max_tokens)
            generation.max_tokens = command.max_tokens
            entry.stream.set_max_tokens(command.max_tokens)
        if command.HasField("stop_conditions"):
            end_tokens = self._host.front().info.eos_token_ids
            entry.stream.set_stop_tokens(convert.stop_tokens(command.stop_conditions, end_tokens))
            generation.set_stops(list(command.stop_conditions.stop))
        generation.origin = None  # its parameters do not tell any more what was generated

    def _interrupt(self, command: pb.SessionInterrupt) -> None:
        entry = self._target(command, "interrupt")
        validate.session_interrupt(command, entry.generation.num_sent)
        if entry.conversation is not None:
            has_count = command.HasField("heard_tokens")
            entry.conversation.interrupt(command.heard_tokens if has_count else entry.generation.num_sent)
        entry.generation.interrupt()

    def _credit(self, command: pb.SessionCredit) -> None:
        entry = self._target(command, "credit")
        validate.session_credit(command, entry.num_granted or 0)
        if entry.num_granted is None:
            raise ServerError(errors.CREDIT_UNLIMITED)
        entry.num_granted += command.tokens
        entry.stream.grant(entry.num_granted)

    def _launch(
        self,
        command: pb.SessionStart | pb.SessionAppend,
        start: Start,
        guard: RequestGuard,
        conversation: Conversation | None,
    ) -> None:
        num_granted = command.credit_tokens if command.HasField("credit_tokens") else None
        if num_granted is not None:
            start = replace(start, credit=num_granted)
        if conversation is not None:
            start = replace(start, conversation=conversation.key, lease=self._config.conversation_lease)
        (generation,) = self._starter.submit(start, guard, self._mailbox)
        entry = _Entry(command.generation_id, generation, guard, conversation, num_granted)
        self._entries[entry.id] = entry
        self._by_stream[entry.stream] = entry
        self._num_started += 1
        started = pb.SessionStarted(generation_id=entry.id, prompt_tokens=len(start.ids))
        self._emit(pb.SessionResponse(started=started))

    @contextlib.contextmanager
    def _guarded(self, priority: int, deadline: float) -> Iterator[RequestGuard]:
        """A guard that is given back unless the generation was launched."""
        guard = self._admission.open(1, convert.claim(priority, self._call.tenant, deadline))
        try:
            yield guard
        except BaseException:
            guard.close()
            raise

    def _check_new(self, generation_id: str) -> None:
        if generation_id in self._entries:
            raise ServerError(errors.GENERATION_EXISTS)
        if len(self._entries) >= self._config.max_generations_per_session:
            raise ServerError(errors.SESSION_FULL, quota="generations")

    def _target(self, command: validate.Named, name: str) -> _Entry:
        """The generation that a command is about."""
        validate.session_target(command, name)
        return self._entry(command.generation_id)

    def _entry(self, generation_id: str) -> _Entry:
        entry = self._entries.get(generation_id)
        if entry is None:
            raise ServerError(errors.GENERATION_NOT_FOUND)
        return entry

    def _deadline(self) -> float:
        """A session may live long; each of its generations has the time of one call."""
        own = time.monotonic() + self._config.default_deadline
        return min(own, self._call.deadline) if self._call.has_deadline else own
