"""Why the engine refuses a sequence. `headrace.server` maps each class to one gRPC status and reason.

Messages are written for the caller of the API: they hold numbers and field names, never prompt text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal


class EngineError(Exception):
    """Root of everything that the engine raises on purpose."""


class ConfigError(EngineError, ValueError):
    """An EngineConfig that cannot work; `problems` holds all of its faults, one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class InvalidSequenceError(EngineError, ValueError):
    """A sequence that could never run. `field` names what is wrong with it, as in SequenceRequest or SamplingParams."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(EngineError):
    """The waiting queue is full; the same request may be admitted later. `limit` says which bound was hit."""

    def __init__(self, limit: Literal["sequences", "tokens"], message: str) -> None:
        super().__init__(message)
        self.limit = limit
