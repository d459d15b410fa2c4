"""One generation on its way from tokens to text: detokenised, cut at stop strings, counted.

The servicers make one per sequence and feed it what its TokenStream gives; `convert.chunk` turns the result into
protobuf.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.engine.types import FinishOutput, TokenOutput
from headrace.models.detokenizer import Detokenizer
from headrace.models.stop import StopStrings
from headrace.models.tokenizer import Tokenizer
from headrace.server import errors
from headrace.server.engine_client import Taken, TokenStream
from headrace.server.errors import ServerError


@dataclass(frozen=True)
class Ending:
    """How a generation ended, as its caller sees it. Times in seconds."""

    reason: str  # "stop", "length" or "cancelled"
    stop_string: str
    stop_token_id: int | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    seed: int


@dataclass(frozen=True)
class Chunk:
    """News of one generation. offset: index of the first of `tokens` among the generated tokens."""

    offset: int
    tokens: list[TokenOutput]
    text: str
    ending: Ending | None


class ExpiredError(Exception):
    """The engine stopped the sequence because its deadline has passed."""


class Generation:
    """State of one generation."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool, *, index: int, seed: int, num_prompt: int
    ) -> None:
        """index: which of the request's n. stops: not empty strings."""
        self.index = index
        self.seed = seed
        self.num_prompt_tokens = num_prompt
        self.max_tokens = 0  # in force; set by who submits
        self.ending: Ending | None = None
        self.stream: TokenStream | None = None
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(stops, include_stop) if stops else None
        self._matched: str | None = None
        self._num_tokens = 0

    def take(self) -> Chunk | None:
        """What is new since the last take; None where nothing can be told yet.

        After a stop string has matched, the sequence is cancelled in the engine, whose later tokens are dropped; the
        ending comes with the engine's answer. Raises ServerError where the sequence failed, ExpiredError at its
        deadline.
        """
        assert self.stream is not None
        return self._consume(self.stream.take())

    def close(self) -> None:
        """Stop the sequence if it runs; call it in `finally`."""
        if self.stream is not None:
            self.stream.close()

    def _consume(self, taken: Taken) -> Chunk | None:
        tokens, finish = taken.tokens, taken.finish
        if finish is not None and finish.reason == "error":
            raise ServerError(errors.NUMERIC) if finish.error == "NUMERIC" else errors.new_incident()
        if finish is not None and finish.reason == "expired" and self._matched is None:
            raise ExpiredError
        text = ""
        if self._matched is not None:
            tokens = []
        elif tokens:
            tokens, text = self._read(tokens, finish)
        offset = self._num_tokens
        self._num_tokens += len(tokens)
        if self._matched is not None and finish is None:
            assert self.stream is not None
            self.stream.cancel()
        if finish is not None:
            if self._matched is None:
                text += self._flush()
            self.ending = self._end(finish)
        if not tokens and not text and self.ending is None:
            return None
        return Chunk(offset, tokens, text, self.ending)

    def _read(self, tokens: list[TokenOutput], finish: FinishOutput | None) -> tuple[list[TokenOutput], str]:
        """The tokens up to a stop string's last one, and their text."""
        silent = finish is not None and finish.stop_token_id is not None  # the stop token is sent, its text is not
        spoken = tokens[:-1] if silent else tokens
        if self._stops is None:
            return tokens, self._detokenizer.push([token.token_id for token in spoken])
        text = ""
        for position, token in enumerate(spoken):
            emitted, self._matched = self._stops.push(self._detokenizer.push([token.token_id]))
            text += emitted
            if self._matched is not None:
                return tokens[: position + 1], text
        return tokens, text

    def _flush(self) -> str:
        """The end of the text: an incomplete character, and what could have become a stop string."""
        rest = self._detokenizer.flush()
        if self._stops is None:
            return rest
        emitted, self._matched = self._stops.push(rest)
        return emitted if self._matched is not None else emitted + self._stops.flush()

    def _end(self, finish: FinishOutput) -> Ending:
        matched = self._matched
        return Ending(
            reason="stop" if matched is not None else finish.reason,
            stop_string=matched or "",
            stop_token_id=finish.stop_token_id if matched is None else None,
            num_prompt_tokens=finish.num_prompt_tokens,
            num_cached_tokens=finish.num_cached_tokens,
            num_generated_tokens=self._num_tokens,
            queue_seconds=finish.queue_seconds,
            prefill_seconds=finish.prefill_seconds,
            decode_seconds=finish.decode_seconds,
            seed=self.seed,
        )
