"""What may be in the server at once, and the one object that owns a request's share of it.

Every RPC that uses the engine opens a `RequestGuard` and closes it in `finally`. Refusals are decided here at once,
without asking the engine, in sequences and in tokens; they tell the client when to come back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from headrace.server import errors
from headrace.server.errors import OverloadedError, ServerError

_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 10.0
_SMOOTHING = 0.2  # weight of the newest request in the mean duration


@dataclass(frozen=True)
class AdmissionStats:
    """Conservation: created - closed - live is 0, or a guard has leaked."""

    num_created: int
    num_closed: int
    num_live: int
    num_sequences: int
    num_tokens: int
    num_refused: int


class Admission:
    """The server's one ledger of live sequences and tokens."""

    def __init__(self, max_sequences: int, max_tokens: int) -> None:
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._num_sequences = 0
        self._num_tokens = 0
        self._num_created = 0
        self._num_closed = 0
        self._num_refused = 0
        self._mean_seconds = 0.0
        self.is_draining = False
        self.on_drain: set[Callable[[], None]] = set()  # called once when draining begins
        self._live: set[RequestGuard] = set()
        self._idle = asyncio.Event()

    def open(self, num_sequences: int) -> RequestGuard:
        """A guard for a request of so many sequences. Raises OverloadedError, or ServerError DRAINING."""
        if self.is_draining:
            raise ServerError(errors.DRAINING)
        if num_sequences > self._max_sequences:
            raise ServerError(errors.REQUEST_TOO_LARGE)
        if self._num_sequences + num_sequences > self._max_sequences:
            raise self._refusal("sequences")
        guard = RequestGuard(self, num_sequences)
        self._num_sequences += num_sequences
        self._num_created += 1
        self._live.add(guard)
        return guard

    def drain(self) -> None:
        """Refuse everything new from now on."""
        self.is_draining = True
        for callback in list(self.on_drain):
            callback()

    async def wait_idle(self) -> None:
        """Until no guard is open."""
        while self._live:
            self._idle.clear()
            await self._idle.wait()

    def stats(self) -> AdmissionStats:
        """A snapshot."""
        return AdmissionStats(
            num_created=self._num_created,
            num_closed=self._num_closed,
            num_live=len(self._live),
            num_sequences=self._num_sequences,
            num_tokens=self._num_tokens,
            num_refused=self._num_refused,
        )

    def reserve(self, guard: RequestGuard, num_tokens: int) -> None:
        """For RequestGuard.reserve_tokens."""
        if num_tokens > self._max_tokens:
            raise ServerError(errors.REQUEST_TOO_LARGE)
        if self._num_tokens + num_tokens > self._max_tokens:
            raise self._refusal("tokens")
        guard.num_tokens += num_tokens
        self._num_tokens += num_tokens

    def release(self, guard: RequestGuard) -> None:
        """For RequestGuard.close."""
        if guard not in self._live:
            return
        self._live.remove(guard)
        self._idle.set()
        self._num_closed += 1
        self._num_sequences -= guard.num_sequences
        self._num_tokens -= guard.num_tokens
        seconds = time.monotonic() - guard.opened
        self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)

    def _refusal(self, quota: str) -> OverloadedError:
        """Come back when about one place should be free: a mean request's time over how many run at once."""
        self._num_refused += 1
        seconds = self._mean_seconds / max(1, len(self._live))
        return OverloadedError(min(max(seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS), quota)


class RequestGuard:
    """One request's share of the server. A context manager; `close` may be called again."""

    def __init__(self, admission: Admission, num_sequences: int) -> None:
        self.num_sequences = num_sequences
        self.num_tokens = 0
        self.opened = time.monotonic()
        self._admission = admission

    def reserve_tokens(self, num_tokens: int) -> None:
        """Take a share of the tokens too, once the prompt is tokenised. Raises OverloadedError or REQUEST_TOO_LARGE."""
        self._admission.reserve(self, num_tokens)

    def close(self) -> None:
        """Give everything back."""
        self._admission.release(self)

    def __enter__(self) -> RequestGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
