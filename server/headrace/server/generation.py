"""One generation on its way from tokens to text: detokenised, cut at stop strings, counted.

The servicers make one per sequence and feed it what its TokenStream gives; `convert.chunk` turns the result into
protobuf.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headrace.engine.types import FinishOutput, SamplingParams, TokenOutput
from headrace.models.detokenizer import Detokenizer
from headrace.models.stop import StopStrings
from headrace.models.tokenizer import Tokenizer
from headrace.server import errors, telemetry
from headrace.server.engine_client import Taken, TokenStream
from headrace.server.errors import InvalidRequestError, ServerError, Violation
from headrace.server.origin import Origin, Receipt, TokenHasher

_HELD = "continuation.token_ids"


@dataclass(frozen=True)
class Ending:
    """How a generation ended, as its caller sees it. Times in seconds."""

    reason: str  # "stop", "length", "cancelled" or "interrupted"
    stop_string: str
    stop_token_id: int | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    seed: int
    receipt: Receipt | None = None


class Chunk(NamedTuple):
    """News of one generation. offset: index of the first of `tokens` among the generated tokens. generation_id: ours.
    origin: in the first chunk where it is to be told."""

    offset: int
    tokens: list[TokenOutput]
    text: str
    ending: Ending | None
    generation_id: str = ""
    origin: Origin | None = None


class ExpiredError(Exception):
    """The engine stopped the sequence because its deadline has passed."""


class Generation:
    """State of one generation."""

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str], include_stop: bool, *, index: int, seed: int, num_prompt: int
    ) -> None:
        """index: which of the request's n. stops: not empty strings."""
        self.id = secrets.token_hex(16)
        self.index = index
        self.seed = seed
        self.origin: Origin | None = None  # None: no receipt; set by who submits, unset by who changes what runs
        self.tells_origin = False  # in the first chunk
        self.num_prompt_tokens = num_prompt
        self.max_tokens = 0  # in force; set by who submits
        self.ending: Ending | None = None
        self.stream: TokenStream | None = None
        self._tokenizer = tokenizer
        self._stop_strings = tuple(stops)  # as at its start
        self._detokenizer = Detokenizer(tokenizer)
        self._includes_stop = include_stop
        self._stops = StopStrings(stops, include_stop) if stops else None
        self._unsent = ""  # what other stop strings let go
        self._is_interrupted = False
        self._matched: str | None = None
        self._num_tokens = 0
        self._hasher = TokenHasher()
        self._text_began = 0.0  # CLOCK_MONOTONIC seconds at the first token
        self._text_seconds = 0.0  # spent on turning tokens into text

    def hold(self, ids: Sequence[int], params: SamplingParams, path: str) -> FinishOutput | None:
        """These tokens were generated elsewhere and are the caller's already, with their text: as if they had been
        taken here. Returns how they end the generation, None where it goes on. Call it before the first take. Raises
        InvalidRequestError where they go on behind an end. path: of the request in its message."""
        ends = frozenset(params.stop_token_ids)
        stop_at = next((i for i, token_id in enumerate(ids) if i >= params.min_tokens and token_id in ends), len(ids))
        last = min(stop_at + 1, params.max_tokens)
        if len(ids) > last:
            raise InvalidRequestError([Violation(f"{path}{_HELD}", f"end before the index {last}", "CONFLICT")])
        stop_token_id = ids[stop_at] if stop_at < len(ids) else None
        spoken = ids[:stop_at]
        text = self._detokenizer.push(spoken)
        if self._stops is not None:
            self._matched = self._stops.push(text).matched
            if self._matched is not None and (stop_token_id is not None or self._stops_within(spoken[:-1])):
                raise InvalidRequestError([Violation(f"{path}{_HELD}", "go on behind a stop string", "CONFLICT")])
        self._num_tokens = len(ids)
        self._hasher.update(ids)
        if self._matched is not None or stop_token_id is not None:
            return FinishOutput("stop", stop_token_id=stop_token_id, num_prompt_tokens=self.num_prompt_tokens)
        is_full = len(ids) >= params.max_tokens
        return FinishOutput("length", num_prompt_tokens=self.num_prompt_tokens) if is_full else None

    def _stops_within(self, ids: Sequence[int]) -> bool:
        """Whether the text of these first tokens holds a stop string."""
        detokenizer, stops = Detokenizer(self._tokenizer), StopStrings(self._stop_strings, False)
        return stops.push(detokenizer.push(ids)).matched is not None

    def take(self) -> Chunk | None:
        """What is new since the last take; None where nothing can be told yet.

        After a stop string has matched, the sequence is cancelled in the engine, whose later tokens are dropped; the
        ending comes with the engine's answer. Raises ServerError where the sequence failed, ExpiredError at its
        deadline.
        """
        assert self.stream is not None
        return self._consume(self.stream.take())

    @property
    def num_sent(self) -> int:
        """Tokens that have been taken."""
        return self._num_tokens

    def interrupt(self) -> None:
        """End it as it is: what has not been taken is dropped, and the ending says "interrupted"."""
        self._is_interrupted = True
        assert self.stream is not None
        self.stream.cancel()

    def set_stops(self, stops: Sequence[str]) -> None:
        """Look for other stop strings, from the first text on that has not been taken. What that lets go, or ends,
        comes with the next take."""
        if self._matched is not None:
            return
        held = self._stops.flush() if self._stops is not None else ""
        self._stops = StopStrings(stops, self._includes_stop) if stops else None
        if self._stops is not None:
            held, self._matched = self._stops.push(held)
        self._unsent += held
        assert self.stream is not None
        self.stream.nudge()

    def close(self) -> None:
        """Stop the sequence if it runs; call it in `finally`."""
        if self.stream is not None:
            self.stream.close()

    def _consume(self, taken: Taken) -> Chunk | None:
        tokens, finish = taken
        if finish is None and tokens and self._is_plain():
            ids = [token.token_id for token in tokens]
            offset = self._num_tokens
            self._num_tokens += len(ids)
            self._hasher.update(ids)
            return Chunk(offset, tokens, self._detokenizer.push(ids), None, self.id)
        if finish is not None and finish.reason == "error":
            raise ServerError(errors.NUMERIC) if finish.error == "NUMERIC" else errors.new_incident()
        is_cut = self._matched is not None or self._is_interrupted
        if finish is not None and finish.reason == "expired" and not is_cut:
            raise ExpiredError
        text, self._unsent = self._unsent, ""
        if is_cut:
            tokens = []
        elif tokens:
            is_traced = self.stream is not None and self.stream.trace_context is not None
            began = time.monotonic() if is_traced else 0.0
            tokens, more = self._read(tokens, finish)
            text += more
            if is_traced:
                self._text_began = self._text_began or began
                self._text_seconds += time.monotonic() - began
        offset = self._num_tokens
        self._num_tokens += len(tokens)
        if tokens:
            self._hasher.update([token.token_id for token in tokens])
        if self._matched is not None and finish is None:
            assert self.stream is not None
            self.stream.cancel()
        if finish is not None:
            if self._matched is None:
                text += self._flush()
            self.ending = self._end(finish)
            if self._text_began and self.stream is not None:
                telemetry.detokenized(self.stream.trace_context, self._text_began, self._text_seconds)
        if not tokens and not text and self.ending is None:
            return None
        tells_origin, self.tells_origin = self.tells_origin, False
        return Chunk(offset, tokens, text, self.ending, self.id, self.origin if tells_origin else None)

    def _is_plain(self) -> bool:
        """Whether tokens become text and nothing else: nearly always, and once per message."""
        return (
            self._stops is None
            and self._matched is None
            and not (self._is_interrupted or self._unsent or self.tells_origin)
            and (self.stream is None or self.stream.trace_context is None)
        )

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
        matched = self._matched if not self._is_interrupted else None
        reason = "interrupted" if self._is_interrupted else "stop" if matched is not None else str(finish.reason)
        return Ending(
            reason=reason,
            stop_string=matched or "",
            stop_token_id=finish.stop_token_id if matched is None and not self._is_interrupted else None,
            num_prompt_tokens=finish.num_prompt_tokens,
            num_cached_tokens=finish.num_cached_tokens,
            num_generated_tokens=self._num_tokens,
            queue_seconds=finish.queue_seconds,
            prefill_seconds=finish.prefill_seconds,
            decode_seconds=finish.decode_seconds,
            seed=self.seed,
            receipt=Receipt(self.origin, self._hasher.hexdigest(), self._num_tokens) if self.origin else None,
        )
