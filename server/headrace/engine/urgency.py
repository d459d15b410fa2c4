"""Which waiting sequence comes next, and who stands before whom among those that run. Called by the scheduler only.

The order, and why (docs/decisions/0010):
1. Batch work (priority BATCH) waits behind all other work.
2. Who has been served before, and lost its blocks, comes before who has not.
3. The tenant that has been served least: a virtual token counter per tenant (Sheng et al. 2024, "Fairness in Serving
   Large Language Models", algorithm 2), a prompt token counting 1 and a generated one 2. Urgency is declared by the
   caller, so it counts within a tenant only.
4. The priority class.
5. Slack: what is left of the time to the deadline after the work. Slack of a minute and more is no urgency: those go by
   order of acceptance, or long jobs would always come before short ones.

Every eighth place goes to who has waited longest instead, whatever the above says: nobody starves.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from headrace.engine.estimates import Estimates
from headrace.engine.sequence import Sequence
from headrace.engine.types import BATCH

_PROMPT_WEIGHT, _OUTPUT_WEIGHT = 1, 2  # the weights of the paper, after the prices of public services
_TURN = 8
_NO_HURRY_SECONDS = 60.0
_MAX_ACCOUNTS = 256  # beyond that, the smaller half of the debts is forgiven


class FairShares:
    """Service received per tenant, in weighted tokens.

    A tenant without an account stands at `floor`, the count of who was chosen last: a newcomer shares from now on and
    cannot claim what it left to others before (the paper's lift of counters).
    """

    def __init__(self) -> None:
        self.floor = 0
        self._accounts: dict[str, int] = {}

    def served(self, tenant: str) -> int:
        """Never less than `floor`."""
        return max(self._accounts.get(tenant, 0), self.floor)

    def charge(self, tenant: str, amount: int) -> None:
        """A tenant has been served."""
        self._accounts[tenant] = self.served(tenant) + amount
        if len(self._accounts) > _MAX_ACCOUNTS:
            self.floor = max(self.floor, sorted(self._accounts.values())[_MAX_ACCOUNTS // 2])
            self._accounts = {name: count for name, count in self._accounts.items() if count > self.floor}

    def chosen(self, tenant: str) -> None:
        """The tenant was the one served least of those who wait: nobody who waits is below it."""
        self.floor = self.served(tenant)


class Queue:
    """Chooses; holds no sequences itself. The two kinds of work, batch and other, have shares of their own: what a
    tenant's batch work took of the time that nobody else wanted is not held against the rest of its work."""

    def __init__(self) -> None:
        self._shares = (FairShares(), FairShares())
        self._num_admitted = 0

    @property
    def is_turn_of_oldest(self) -> bool:
        """Whether the next place goes by the time of waiting alone."""
        return self._num_admitted % _TURN == _TURN - 1

    def next(self, waiting: Seq[Sequence], now: float, estimates: Estimates) -> Sequence:
        """Who of `waiting` (not empty, by order of acceptance) is admitted next."""
        if len(waiting) == 1 or self.is_turn_of_oldest:
            return waiting[0]
        token_seconds, prompt_seconds = estimates.token_seconds, estimates.step.per_token
        return min(waiting, key=lambda seq: self._key(seq, now, token_seconds, prompt_seconds))

    def admitted(self, seq: Sequence) -> None:
        """The sequence runs from now on. Sets its standing among those that run."""
        seq.standing = -1 if self.is_turn_of_oldest else seq.priority
        shares = self._shares[seq.priority == BATCH]
        if not self.is_turn_of_oldest:
            shares.chosen(seq.tenant)
        self._num_admitted += 1

    def charge_prompt(self, seq: Sequence, num_tokens: int) -> None:
        """Prompt tokens will be computed for it: once, not again after a preemption, which was not its wish."""
        self._shares[seq.priority == BATCH].charge(seq.tenant, num_tokens * _PROMPT_WEIGHT)

    def charge_output(self, seq: Sequence) -> None:
        """It got a token."""
        self._shares[seq.priority == BATCH].charge(seq.tenant, _OUTPUT_WEIGHT)

    def served(self, seq: Sequence) -> int:
        """What its tenant has had."""
        return self._shares[seq.priority == BATCH].served(seq.tenant)

    def _key(
        self, seq: Sequence, now: float, token_seconds: float, prompt_seconds: float
    ) -> tuple[bool, bool, int, int, float, int]:
        is_new = seq.first_scheduled_at is None
        urgency = slack(seq, now, token_seconds, prompt_seconds)
        return (seq.priority == BATCH, is_new, self.served(seq), seq.priority, urgency, seq.order)


def slack(seq: Sequence, now: float, token_seconds: float, prompt_seconds: float) -> float:
    """Seconds that a sequence can still wait and be done by its deadline, at most _NO_HURRY_SECONDS. The costs of a
    generated token and of one of the prompt are estimates, 0 where there is none yet."""
    if seq.deadline is None:
        return _NO_HURRY_SECONDS
    num_outputs = 0 if seq.is_score else seq.max_tokens - len(seq.outputs)
    work = (seq.num_to_compute - seq.num_computed) * prompt_seconds + num_outputs * token_seconds
    return min(seq.deadline - now - work, _NO_HURRY_SECONDS)


def standing(seq: Sequence) -> tuple[int, int]:
    """Among those that run, who stands before another may take its blocks: by class, then by age. Who was admitted
    because it had waited longest stands before all classes, so that it is not put back again."""
    return (seq.standing, seq.order)
