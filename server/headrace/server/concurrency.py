"""How many sequences may be in the server, found by trying: additive increase, multiplicative decrease by step time.

Pure; `admission.py` feeds it the engine's running mean of the time between a stream's tokens, which grows with the
batch. Without a target the limit stays at its most. (Chiu and Jain 1989 on why AIMD is fair and stable.)
"""

from __future__ import annotations

_INTERVAL_SECONDS = 0.25  # between two changes: the running mean needs some steps to follow
_DECREASE = 0.85
_INCREASE_SHARE = 1 / 64  # of the most, at least one


class ConcurrencyLimit:
    """`value` is at least 1 and at most `most`."""

    def __init__(self, most: int, target_seconds: float) -> None:
        """target_seconds: what a stream may wait for its next token; 0: there is no target."""
        self.value = most
        self._most = most
        self._target = target_seconds
        self._step = max(1, round(most * _INCREASE_SHARE))
        self._next_change = 0.0

    def observe(self, token_seconds: float, num_used: int, now: float) -> None:
        """What streams wait now, and how many sequences are in the server."""
        if not self._target or now < self._next_change:
            return
        self._next_change = now + _INTERVAL_SECONDS
        if token_seconds > self._target:
            # From what is in use: a limit that nobody reaches would take many steps to mean anything.
            self.value = max(1, int(min(self.value, num_used) * _DECREASE))
        elif num_used >= self.value - self._step:
            self.value = min(self._most, self.value + self._step)
