"""Who has what in the server: live sequences, tokens and the queue, in all and by tenant. Kept by `admission.py`."""

from __future__ import annotations

from dataclasses import dataclass, field

from headrace.server.forecast import Backlog

_NUM_CLASSES = 3


@dataclass
class Share:
    """What is in the server. Queued: submitted, without a first token yet."""

    num_sequences: int = 0
    num_tokens: int = 0
    num_requests: int = 0
    queued: list[int] = field(default_factory=lambda: [0] * _NUM_CLASSES)  # sequences, by class of priority
    queued_tokens: list[int] = field(default_factory=lambda: [0] * _NUM_CLASSES)  # of their prompts

    @property
    def num_queued(self) -> int:
        return sum(self.queued)

    @property
    def num_queued_tokens(self) -> int:
        return sum(self.queued_tokens)


class Ledger:
    """Counts only; a tenant without a request is forgotten."""

    def __init__(self) -> None:
        self.total = Share()
        self._tenants: dict[str, Share] = {}

    @property
    def num_tenants(self) -> int:
        """Tenants that have a request in the server."""
        return len(self._tenants)

    def of(self, tenant: str) -> Share:
        """A tenant's share; an empty one where it has nothing."""
        return self._tenants.get(tenant) or Share()

    def enter(self, tenant: str, num_sequences: int) -> None:
        """A request."""
        for share in (self.total, self._tenants.setdefault(tenant, Share())):
            share.num_requests += 1
            share.num_sequences += num_sequences

    def reserve(self, tenant: str, num_tokens: int) -> None:
        """Tokens for a request that has entered."""
        for share in (self.total, self._tenants[tenant]):
            share.num_tokens += num_tokens

    def enqueue(self, tenant: str, priority: int, num_sequences: int, num_prompt: int) -> None:
        """Sequences with prompts of so many tokens each wait for their first token."""
        for share in (self.total, self._tenants[tenant]):
            share.queued[priority] += num_sequences
            share.queued_tokens[priority] += num_sequences * num_prompt

    def dequeue(self, tenant: str, priority: int, num_sequences: int, num_prompt: int) -> None:
        """They wait no longer."""
        self.enqueue(tenant, priority, -num_sequences, num_prompt)

    def leave(self, tenant: str, num_sequences: int, num_tokens: int) -> None:
        """A request has ended, none of its sequences is queued."""
        share = self._tenants[tenant]
        for each in (self.total, share):
            each.num_requests -= 1
            each.num_sequences -= num_sequences
            each.num_tokens -= num_tokens
        if not share.num_requests:
            del self._tenants[tenant]

    def ahead_of(self, tenant: str, priority: int, num_entered: int) -> Backlog:
        """What a new request of this tenant and class waits for: the queue of its class and those before, but of other
        tenants no more than their fair share of the turns that its own queue takes. num_entered: of its own sequences,
        those that have entered and are not queued yet."""
        classes = range(priority + 1)
        total, own = self.total, self.of(tenant)
        num_running = total.num_sequences - total.num_queued - num_entered
        num_queued, num_tokens = _sum(total.queued, classes), _sum(total.queued_tokens, classes)
        others = len(self._tenants.keys() - {tenant})
        if others and num_queued:
            turns = _sum(own.queued, classes) + 1  # its own, each with one of every other tenant
            fair = min(1.0, turns * (others + 1) / num_queued)
            num_queued, num_tokens = round(num_queued * fair), round(num_tokens * fair)
        return Backlog(max(0, num_running), num_queued, num_tokens)


def _sum(values: list[int], classes: range) -> int:
    return sum(values[index] for index in classes)
