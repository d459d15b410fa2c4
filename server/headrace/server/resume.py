"""Resumable generations: each runs on a task of its own into a log of its messages, which at most one call reads.

`inference.py` starts them for Generate calls with `resumable`, and lets Generate, Resume and Cancel at them. A call
that ends early only detaches: the generation goes on for a time of grace, because nothing tells a client that vanished
from one that cancelled (decisions/0009). The log is bounded in bytes and in time; what is not kept any more is answered
with GENERATION_UNKNOWN or OFFSET_NOT_KEPT, and the client goes on by a continuation.
"""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass

from headrace.server import convert, errors
from headrace.server.admission import RequestGuard
from headrace.server.engine_client import Mailbox
from headrace.server.errors import ServerError
from headrace.server.generation import Chunk, ExpiredError, Generation
from headrace.server.rpc import Call
from headrace.v1 import inference_pb2 as pb

log = logging.getLogger("headrace.server")

# What an entry and a generation take beside their messages' bytes, so that counts are bounded by bytes too.
_ENTRY_BYTES = 150
_KEPT_BYTES = 2048


@dataclass(frozen=True)
class ResumeLimits:
    """Seconds and bytes, as in ServerConfig."""

    grace: float
    retention: float
    max_bytes: int
    buffer_tokens: int


@dataclass(frozen=True)
class _Entry:
    """One message, serialised: GenerateResponse and ResumeResponse are alike on the wire."""

    offset: int
    data: bytes


class Registry:
    """All resumable generations of a server, by the server's own ids."""

    def __init__(self, limits: ResumeLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self._kept: dict[str, Kept] = {}
        self._ended: dict[str, Kept] = {}  # of those, the ones to let go first, in order of their end
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_kept(self) -> int:
        """Generations that can be resumed."""
        return len(self._kept)

    def start(self, generation: Generation, mailbox: Mailbox, guard: RequestGuard, kept: Kept) -> None:
        """Let a submitted generation run; `generation` and `guard` are ours from here on."""
        self._kept[kept.id] = kept
        self.charge(kept, _KEPT_BYTES)
        task = asyncio.ensure_future(kept.produce(generation, mailbox, guard))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def find(self, generation_id: str, tenant: str) -> Kept:
        """Raises GENERATION_UNKNOWN, for another tenant's too: whether an id is in use is nobody else's business."""
        kept = self._kept.get(generation_id)
        if kept is None or kept.tenant != tenant:
            raise ServerError(errors.GENERATION_UNKNOWN)
        return kept

    def ended(self, kept: Kept) -> None:
        """Its messages stay for a while."""
        if self.keeps(kept):
            self._ended[kept.id] = kept
            timer = asyncio.get_running_loop().call_later(self.limits.retention, self.forget, kept)
            self._timers[kept.id] = timer

    def forget(self, kept: Kept) -> None:
        """Nobody can resume it from here on; who reads it reads on. Idempotent."""
        if self._kept.pop(kept.id, None) is None:
            return
        self._ended.pop(kept.id, None)
        timer = self._timers.pop(kept.id, None)
        if timer is not None:
            timer.cancel()
        self.num_bytes -= kept.num_bytes
        kept.num_bytes = 0

    def charge(self, kept: Kept, num_bytes: int) -> None:
        """It keeps so many bytes more. Where that is too much, the oldest ended go, then what of it has been read, then
        it itself."""
        if not self.keeps(kept):
            kept.drop_read()
            return
        self._add(kept, num_bytes)
        while self.num_bytes > self.limits.max_bytes and self._ended:
            self.forget(next(iter(self._ended.values())))
        if self.num_bytes > self.limits.max_bytes:
            self._add(kept, -kept.drop_read())
        if self.num_bytes > self.limits.max_bytes:
            kept.abandon()

    def _add(self, kept: Kept, num_bytes: int) -> None:
        self.num_bytes += num_bytes
        kept.num_bytes += num_bytes

    def keeps(self, kept: Kept) -> bool:
        """Whether it can be resumed."""
        return self._kept.get(kept.id) is kept

    def abandon_unread(self) -> None:
        """The server drains: nobody can come back for these."""
        for kept in list(self._kept.values()):
            if kept.reader is None:
                kept.abandon()

    async def close(self) -> None:
        """Stop whatever runs."""
        for kept in list(self._kept.values()):
            self.forget(kept)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Kept:
    """One resumable generation."""

    def __init__(self, registry: Registry, generation_id: str, tenant: str, first_offset: int) -> None:
        """first_offset: tokens that its caller held before it began here."""
        self.id = generation_id
        self.tenant = tenant
        self.reader: Call | None = None
        self.num_bytes = 0
        self.ending: Chunk | None = None
        self.first_offset = first_offset
        self._registry = registry
        self._entries: deque[_Entry] = deque()
        self._num_dropped = 0  # messages before the first of `_entries`
        self._num_read = 0  # messages that the present reader has written
        self._num_tokens = first_offset  # offset of the next token
        self._read_offset = first_offset  # of the next token that the present reader has not written
        self._is_done = False
        self._failure: ServerError | None = None
        self._is_expired = False
        self._generation: Generation | None = None
        self._is_ending = False
        self._changed = asyncio.Event()  # there is something to read, or nothing more will come
        self._has_room = asyncio.Event()  # the reader has caught up or gone
        self._grace: asyncio.TimerHandle | None = None

    async def follow(self, call: Call, next_offset: int) -> None:
        """Write the messages from an offset on, until the last. Takes the generation over from an older reader. Raises
        ServerError: OFFSET_AHEAD, OFFSET_NOT_KEPT, or whatever became of the generation."""
        position = self._seek(next_offset)
        self._attach(call, position, next_offset)
        try:
            await call.admit()
            while True:
                self._changed.clear()
                while position < self._num_dropped + len(self._entries):
                    entry = self._entries[position - self._num_dropped]
                    await call.write_serialized(entry.data)
                    position += 1
                    if self.reader is call:
                        self._advance_reader(position)
                if self._is_done:
                    break
                await self._changed.wait()
        finally:
            self._detach(call)
        if self._is_expired:
            await call.expire()
        if self._failure is not None:
            raise self._failure

    def cut_off(self, error: ServerError) -> None:
        """The reader has been behind for too long: it alone ends."""
        if self.reader is not None:
            self.reader.interrupt(error)

    def cancel(self) -> None:
        """End the generation at once; its reader sees FINISH_REASON_CANCELLED. Raises GENERATION_UNKNOWN where it has
        ended."""
        if self._is_done:
            raise ServerError(errors.GENERATION_UNKNOWN)
        self._end()

    def abandon(self) -> None:
        """Nobody will come back for it."""
        self._registry.forget(self)
        if self.reader is None and not self._is_done:
            self._end()

    def drop_read(self) -> int:
        """Keep only messages that its reader has not written yet. Returns the bytes freed."""
        freed = 0
        while self.reader is not None and self._entries and self._num_dropped < self._num_read:
            freed += len(self._entries.popleft().data) + _ENTRY_BYTES
            self._num_dropped += 1
        return freed

    async def produce(self, generation: Generation, mailbox: Mailbox, guard: RequestGuard) -> None:
        """Run the generation into the log; gives everything back at its end, however it comes."""
        self._generation = generation
        try:
            while generation.ending is None:
                await mailbox.wait()
                news = generation.take()
                if news is not None:
                    self._append(generation.index, news)
                await self._wait_for_reader()
        except ExpiredError:
            self._is_expired = True
            self._failure = ServerError(errors.TIME_LIMIT)
        except ServerError as error:
            self._failure = error
        except asyncio.CancelledError:
            self._failure = ServerError(errors.DRAINING)
            raise
        except Exception as error:
            self._failure = errors.new_incident()
            log.exception("incident %s in a resumable generation: %s", self._failure.incident, type(error).__name__)
        finally:
            generation.close()
            guard.close()
            self._is_done = True
            self._changed.set()
            if self._grace is not None:
                self._grace.cancel()
            if self._failure is not None:
                self._registry.forget(self)
            self._registry.ended(self)

    def _append(self, index: int, news: Chunk) -> None:
        data = pb.GenerateResponse(chunk=convert.chunk(index, news)).SerializeToString()
        self._entries.append(_Entry(news.offset, data))
        self._num_tokens = news.offset + len(news.tokens)
        if news.ending is not None:
            self.ending = news
        self._changed.set()
        self._registry.charge(self, len(data) + _ENTRY_BYTES)

    def _end(self) -> None:
        self._is_ending = True
        if self._generation is not None and self._generation.stream is not None:
            self._generation.stream.cancel()
        self._has_room.set()

    async def _wait_for_reader(self) -> None:
        """A reader that is behind holds the sequence back, as without a log: its stream fills up, and parks it."""
        while self.reader is not None and not self._is_ending and self._is_behind():
            self._has_room.clear()
            await self._has_room.wait()

    def _is_behind(self) -> bool:
        return self._num_tokens - self._read_offset >= self._registry.limits.buffer_tokens

    def _seek(self, offset: int) -> int:
        """Position of the first message from an offset on."""
        if offset > self._num_tokens:
            raise ServerError(errors.OFFSET_AHEAD)
        index = bisect_left(self._entries, offset, key=lambda entry: entry.offset)
        is_there = offset == (self._entries[index].offset if index < len(self._entries) else self._num_tokens)
        if not is_there:
            raise ServerError(errors.OFFSET_NOT_KEPT)
        return self._num_dropped + index

    def _attach(self, call: Call, position: int, offset: int) -> None:
        if self.reader is not None:
            self.reader.interrupt(ServerError(errors.SUPERSEDED))
        self.reader = call
        self._num_read, self._read_offset = position, offset
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None

    def _advance_reader(self, position: int) -> None:
        self._num_read = position
        index = position - self._num_dropped
        self._read_offset = self._entries[index].offset if index < len(self._entries) else self._num_tokens
        self._has_room.set()

    def _detach(self, call: Call) -> None:
        if self.reader is not call:
            return
        self.reader = None
        self._has_room.set()
        if not self._is_done:
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(self._registry.limits.grace, self.abandon)
