"""What may be in the server at once, and the one object that owns a request's share of it.

Every RPC that uses the engine opens a `RequestGuard` and closes it in `finally`. Refusals are decided here at once,
without asking the engine: by counts of sequences, of tokens and of the KV cache they would need, and by forecasts of
the first token (against the SLO) and of the last (against the deadline). They tell the client when to come back.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from headrace.engine.types import BATCH, STANDARD, EngineStats
from headrace.server import errors, forecast
from headrace.server.concurrency import ConcurrencyLimit
from headrace.server.errors import OverloadedError, ServerError
from headrace.server.forecast import Capacity, Work
from headrace.server.ledger import Ledger

_MIN_RETRY_SECONDS = 0.1
_MAX_RETRY_SECONDS = 10.0
_RETRY_JITTER = 0.25  # clients that were refused together must not come back together
_SMOOTHING = 0.2  # weight of the newest request in the mean duration
_PRESSURE = 0.75  # of the limit: where degradation begins


@dataclass(frozen=True)
class AdmissionLimits:
    """Settings of ServerConfig, under the same names; 0 switches off what says so there."""

    max_live_sequences: int
    max_live_tokens: int
    kv_overcommit: float = 0.0
    batch_share: float = 1.0
    slo_ttft: float = 0.0
    slo_tpot: float = 0.0
    degrade_max_tokens: int = 0


@dataclass(frozen=True)
class Claim:
    """Who asks, and how urgently. deadline: CLOCK_MONOTONIC seconds."""

    tenant: str = ""
    priority: int = STANDARD
    deadline: float = math.inf


@dataclass(frozen=True)
class AdmissionStats:
    """Conservation: created - closed - live is 0, or a guard has leaked. Queued are those without a first token yet;
    queue_seconds is how long the oldest of them has been waiting."""

    num_created: int
    num_closed: int
    num_live: int
    num_sequences: int
    num_tokens: int
    num_refused: int
    num_queued: int
    num_queued_tokens: int
    queue_seconds: float
    max_sequences: int  # the limit in force


class Admission:
    """The server's one ledger of live sequences and tokens."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self._concurrency = ConcurrencyLimit(limits.max_live_sequences, limits.slo_tpot)
        self._capacity: Capacity | None = None
        self._stats = EngineStats()
        self._ledger = Ledger()
        self._num_created = 0
        self._num_closed = 0
        self._num_refused = 0
        self._mean_seconds = 0.0
        self.is_draining = False
        self.on_drain: set[Callable[[], None]] = set()  # called once when draining begins
        self._live: set[RequestGuard] = set()
        self._queued: dict[RequestGuard, None] = {}  # without all their first tokens; the oldest first
        self._idle = asyncio.Event()

    def open(self, num_sequences: int, claim: Claim = Claim()) -> RequestGuard:
        """A guard for a request of so many sequences. Raises OverloadedError, or ServerError DRAINING,
        REQUEST_TOO_LARGE or DEADLINE_UNMEETABLE."""
        if self.is_draining:
            raise ServerError(errors.DRAINING)
        if num_sequences > self._limits.max_live_sequences:
            raise ServerError(errors.REQUEST_TOO_LARGE)
        if num_sequences:
            if not self._has_place(num_sequences, claim):
                raise self._refusal("sequences")
            self._foresee(claim, Work(num_sequences, 0, 1), num_entered=0)  # before the work of tokenising
        guard = RequestGuard(self, num_sequences, claim)
        self._ledger.enter(claim.tenant, num_sequences)
        self._num_created += 1
        self._live.add(guard)
        return guard

    def observe(self, stats: EngineStats, capacity: Capacity) -> None:
        """News of the engine, with every step."""
        self._stats, self._capacity = stats, capacity
        self._concurrency.observe(stats.token_seconds, self._ledger.total.num_sequences, time.monotonic())

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
        total = self._ledger.total
        return AdmissionStats(
            num_created=self._num_created,
            num_closed=self._num_closed,
            num_live=len(self._live),
            num_sequences=total.num_sequences,
            num_tokens=total.num_tokens,
            num_refused=self._num_refused,
            num_queued=total.num_queued,
            num_queued_tokens=total.num_queued_tokens,
            queue_seconds=self._queue_seconds(),
            max_sequences=self._concurrency.value,
        )

    # ---- for RequestGuard ----

    def cap_max_tokens(self, max_tokens: int, min_tokens: int) -> int:
        """See RequestGuard."""
        most = self._limits.degrade_max_tokens
        if not most or self._ledger.total.num_sequences < _PRESSURE * self._concurrency.value:
            return max_tokens
        return min(max_tokens, max(most, min_tokens))

    def reserve(self, guard: RequestGuard, num_tokens: int) -> None:
        """See RequestGuard."""
        if num_tokens > self._limits.max_live_tokens:
            raise ServerError(errors.REQUEST_TOO_LARGE)
        limit, quota = float(self._limits.max_live_tokens), "tokens"
        if self._limits.kv_overcommit and self._capacity is not None:
            kv_limit = self._limits.kv_overcommit * self._capacity.kv_tokens
            limit, quota = min((limit, quota), (kv_limit, "KV cache"))
        total, own = self._ledger.total.num_tokens, self._ledger.of(guard.claim.tenant).num_tokens
        if not _fits(num_tokens, total, own, self._ledger.num_tenants, limit):
            raise self._refusal(quota)
        self._ledger.reserve(guard.claim.tenant, num_tokens)
        guard.num_tokens += num_tokens

    def enqueue(self, guard: RequestGuard, work: Work) -> None:
        """See RequestGuard.begin."""
        self._foresee(guard.claim, work, num_entered=guard.num_sequences)
        self.reserve(guard, work.num_sequences * (work.num_prompt + work.max_tokens))
        guard.num_queued, guard.num_prompt = work.num_sequences, work.num_prompt
        self._ledger.enqueue(guard.claim.tenant, guard.claim.priority, work.num_sequences, work.num_prompt)
        self._queued[guard] = None

    def dequeue(self, guard: RequestGuard, num_sequences: int) -> None:
        """So many sequences of a guard do not wait for their first token any more."""
        guard.num_queued -= num_sequences
        self._ledger.dequeue(guard.claim.tenant, guard.claim.priority, num_sequences, guard.num_prompt)
        if not guard.num_queued:
            self._queued.pop(guard, None)

    def release(self, guard: RequestGuard) -> None:
        """For RequestGuard.close."""
        if guard not in self._live:
            return
        self._live.remove(guard)
        self._idle.set()
        self._num_closed += 1
        if guard.num_queued:
            self.dequeue(guard, guard.num_queued)
        self._ledger.leave(guard.claim.tenant, guard.num_sequences, guard.num_tokens)
        if guard.num_sequences:  # not a session, which may be open for hours and takes no place
            seconds = time.monotonic() - guard.opened
            self._mean_seconds += _SMOOTHING * (seconds - self._mean_seconds)

    # ---- decisions ----

    def _has_place(self, num_sequences: int, claim: Claim) -> bool:
        limit = float(self._concurrency.value)
        total, own = self._ledger.total.num_sequences, self._ledger.of(claim.tenant).num_sequences
        if claim.priority == BATCH:  # the first to be refused, and not protected from other tenants
            return not total or total + num_sequences <= limit * self._limits.batch_share
        return _fits(num_sequences, total, own, self._ledger.num_tenants, limit)

    def _foresee(self, claim: Claim, work: Work, *, num_entered: int) -> None:
        """Refuse what would be late. An empty server tries everything: what it knows of costs may be long out of
        date, and only work brings news. num_entered: of the request's sequences, those in the ledger already."""
        remaining = claim.deadline - time.monotonic()
        if remaining <= 0.0:
            raise ServerError(errors.DEADLINE_UNMEETABLE)
        if self._capacity is None or self._ledger.total.num_sequences == num_entered:
            return
        backlog = self._ledger.ahead_of(claim.tenant, claim.priority, num_entered)
        slo = self._limits.slo_ttft
        if slo and forecast.first_token_seconds(self._stats, self._capacity, backlog, work) > slo:
            raise self._refusal("queue")
        if forecast.finish_seconds(self._stats, self._capacity, backlog, work) > remaining:
            self._num_refused += 1
            raise ServerError(errors.DEADLINE_UNMEETABLE, retry_after=self._retry_seconds())

    def _refusal(self, quota: str) -> OverloadedError:
        self._num_refused += 1
        return OverloadedError(self._retry_seconds(), quota)

    def _retry_seconds(self) -> float:
        """Come back when about one place should be free, a mean request's time over how many run at once, and later
        the longer the oldest in the queue has been waiting."""
        seconds = self._mean_seconds / max(1, len(self._live)) + self._queue_seconds()
        seconds = min(max(seconds, _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)
        return seconds * (1.0 + _RETRY_JITTER * random.random())

    def _queue_seconds(self) -> float:
        oldest = next(iter(self._queued), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.queued


def _fits(more: int, total: int, own: int, num_tenants: int, limit: float) -> bool:
    """Whether there is room for `more` beside `total`. A tenant within its fair share has room although others have
    filled the limit, up to twice the limit: they came first, which must not shut it out. An empty server always has."""
    if not total or total + more <= limit:
        return True
    share = limit / (num_tenants + (own == 0))
    return own + more <= share and total + more <= 2 * limit


class RequestGuard:
    """One request's share of the server. A context manager; `close` may be called again."""

    def __init__(self, admission: Admission, num_sequences: int, claim: Claim) -> None:
        self.num_sequences = num_sequences
        self.claim = claim
        self.num_tokens = 0
        self.num_queued = 0  # sequences without a first token
        self.num_prompt = 0  # tokens of each
        self.capped_to = 0  # max_tokens, where it was cut
        self.opened = self.queued = time.monotonic()
        self._admission = admission

    def cap_max_tokens(self, max_tokens: int, min_tokens: int) -> int:
        """max_tokens, or less where the server degrades under load and says so."""
        capped = self._admission.cap_max_tokens(max_tokens, min_tokens)
        self.capped_to = capped if capped < max_tokens else 0
        return capped

    def reserve_tokens(self, num_tokens: int) -> None:
        """Take a share of the tokens too. Raises OverloadedError or REQUEST_TOO_LARGE."""
        self._admission.reserve(self, num_tokens)

    def begin(self, num_prompt: int, max_tokens: int) -> None:
        """The sequences are about to be submitted, each with so many tokens: takes those, and a place in the queue.
        Raises OverloadedError, or ServerError REQUEST_TOO_LARGE or DEADLINE_UNMEETABLE."""
        self.queued = time.monotonic()
        self._admission.enqueue(self, Work(self.num_sequences, num_prompt, max_tokens))

    def started(self) -> None:
        """One of the sequences has its first token, or has ended."""
        if self.num_queued:
            self._admission.dequeue(self, 1)

    def close(self) -> None:
        """Give everything back."""
        self._admission.release(self)

    def __enter__(self) -> RequestGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
