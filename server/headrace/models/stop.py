"""Finds stop strings in text that arrives in pieces; called by the front end, once per stream and push of text.

Text that may yet turn out to be a stop string is held back, so that no part of one is ever sent. What is found does not
depend on how the text was cut: the match that ends first wins, and of those that end together the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class StopResult(NamedTuple):
    """`emit` may go to the client; `matched` is the stop string that ended the text, None while it goes on."""

    emit: str
    matched: str | None


@dataclass(frozen=True)
class _Pattern:
    text: str
    fallback: tuple[int, ...]  # [n]: length of the longest proper border of the first n characters

    def advance(self, length: int, char: str) -> int:
        """Length of the pattern's start that the text ends with, after one more character (Knuth, Morris, Pratt)."""
        while length and self.text[length] != char:
            length = self.fallback[length]
        return length + 1 if self.text[length] == char else 0


class StopStrings:
    """State of one stream. Holds back fewer characters than the longest stop string has."""

    def __init__(self, stops: Sequence[str], include_stop: bool) -> None:
        """`include_stop`: the stop string itself is emitted too. Raises ValueError for an empty stop string."""
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._patterns = [_Pattern(stop, _borders(stop)) for stop in dict.fromkeys(stops)]
        self._lengths = [0] * len(self._patterns)
        self._starts = frozenset(stop[0] for stop in stops)
        self._include_stop = include_stop
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> StopResult:
        """Takes the next piece of text. Once a stop string has matched, all further text is dropped."""
        if self._matched is not None:
            return StopResult("", self._matched)
        if not self._held and self._starts.isdisjoint(text):
            return StopResult(text, None)
        seen = self._held + text
        for end in range(len(self._held), len(seen)):
            matched = self._advance(seen[end])
            if matched is not None:
                self._held, self._matched = "", matched
                stop_end = end + 1
                return StopResult(seen[: stop_end if self._include_stop else stop_end - len(matched)], matched)
        cut = len(seen) - max(self._lengths)
        self._held = seen[cut:]
        return StopResult(seen[:cut], None)

    def flush(self) -> str:
        """What is still held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        self._lengths = [0] * len(self._patterns)
        return held

    def _advance(self, char: str) -> str | None:
        """Moves every pattern on by one character; the longest one that is complete, if any."""
        matched: str | None = None
        for index, pattern in enumerate(self._patterns):
            length = pattern.advance(self._lengths[index], char)
            self._lengths[index] = length
            if length == len(pattern.text) and length > len(matched or ""):
                matched = pattern.text
        return matched


def _borders(text: str) -> tuple[int, ...]:
    borders = [0] * (len(text) + 1)
    length = 0
    for index in range(1, len(text)):
        while length and text[length] != text[index]:
            length = borders[length]
        length += text[length] == text[index]
        borders[index + 1] = length
    return tuple(borders)
