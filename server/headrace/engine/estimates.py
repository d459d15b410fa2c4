"""What work costs here, learnt from what it cost: for the scheduler's slack and the front end's forecasts.

Fed by `engine.Engine` with every step and by the scheduler with every end; read through `EngineStats`. All are running
means that forget, so they follow the load, and 0 until there is something to say.
"""

from __future__ import annotations

_STEP_WEIGHT = 0.05  # of the newest step: the memory is about 20 steps, some seconds on a CPU
_ENDING_WEIGHT = 0.1  # of the newest sequence that ended


class Mean:
    """A running mean that begins with its first value."""

    def __init__(self, weight: float) -> None:
        self.value = 0.0
        self._weight = weight
        self._is_empty = True

    def add(self, value: float) -> None:
        """One more."""
        self.value = value if self._is_empty else self.value + self._weight * (value - self.value)
        self._is_empty = False


class StepCost:
    """Seconds of a step by its tokens: a line through the recent steps (least squares with exponential forgetting).

    The slope is kept between 0 and proportionality, so that neither noise nor steps that are all alike give nonsense.
    """

    def __init__(self) -> None:
        self._tokens, self._seconds = Mean(_STEP_WEIGHT), Mean(_STEP_WEIGHT)
        self._squares, self._products = Mean(_STEP_WEIGHT), Mean(_STEP_WEIGHT)

    def add(self, num_tokens: int, seconds: float) -> None:
        """A step."""
        self._tokens.add(num_tokens)
        self._seconds.add(seconds)
        self._squares.add(num_tokens * num_tokens)
        self._products.add(num_tokens * seconds)

    @property
    def per_token(self) -> float:
        """Seconds that one more token adds to a step."""
        x, y = self._tokens.value, self._seconds.value
        if x <= 0.0:
            return 0.0
        variance = self._squares.value - x * x
        proportional = y / x
        if variance <= 0.01 * x * x:  # steps that are all alike say nothing about others
            return proportional
        return min(max((self._products.value - x * y) / variance, 0.0), proportional)

    @property
    def fixed(self) -> float:
        """Seconds of a step without any token."""
        return max(0.0, self._seconds.value - self.per_token * self._tokens.value)


class Estimates:
    """All that is learnt.

    step: cost of a step. token_seconds: mean seconds of a step in which something was generated, which is what a
    running stream waits for its next token. residence_seconds: from a sequence's first step to its end. output_share:
    of max_tokens, how much was generated. cached_share: of prompts, what the prefix cache held.
    """

    def __init__(self) -> None:
        self.step = StepCost()
        self._token_seconds = Mean(_STEP_WEIGHT)
        self._residence_seconds = Mean(_ENDING_WEIGHT)
        self._output_share = Mean(_ENDING_WEIGHT)
        self._cached_share = Mean(_ENDING_WEIGHT)

    @property
    def token_seconds(self) -> float:
        return self._token_seconds.value

    @property
    def residence_seconds(self) -> float:
        return self._residence_seconds.value

    @property
    def output_share(self) -> float:
        return self._output_share.value

    @property
    def cached_share(self) -> float:
        return self._cached_share.value

    def add_step(self, num_tokens: int, num_logits: int, seconds: float) -> None:
        """A step of so many rows and rows of logits took so long."""
        self.step.add(num_tokens, seconds)
        if num_logits:
            self._token_seconds.add(seconds)

    def add_start(self, num_prompt: int, num_cached: int) -> None:
        """A sequence runs for the first time, with so much of its prompt in the prefix cache."""
        self._cached_share.add(num_cached / num_prompt)

    def add_end(self, residence_seconds: float, num_outputs: int, max_tokens: int) -> None:
        """A sequence that generated has ended, other than by its deadline or a fault."""
        self._residence_seconds.add(residence_seconds)
        self._output_share.add(min(1.0, num_outputs / max_tokens))
