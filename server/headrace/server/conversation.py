"""A chat that a session keeps: its messages and the exact tokens the engine has seen, so that the prefix cache hits.

The next turn's prompt is the chat template's text of the whole conversation. Where that text begins with what the
engine has seen already, the known tokens are taken as they are and only the rest is tokenised; tokenising everything
anew could cut the answer's text into other tokens than the model chose, and would miss the cache. Where it does not (a
template that trims, an answer cut by a stop string), everything is tokenised anew.

An answer that was interrupted stands for its tokens, wherever they end: within a word, or a character. The template
gets a mark in its place, a number that nobody else can have written, which it neither trims nor rewrites; what comes
after the mark goes on behind the tokens that were heard.
"""

from __future__ import annotations

import itertools
import secrets
import string
from dataclasses import dataclass

from headrace.models.detokenizer import Detokenizer
from headrace.models.tokenizer import Tokenizer
from headrace.server.generation import Chunk
from headrace.server.prompts import Prepared, Prompts
from headrace.v1 import inference_pb2 as pb

_MARK_DIGITS = 34  # 112 bits

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """What a generation is asked. said: all messages so far, shielded (`Prompts.messages`). marked: the same, as
    `prompt` was rendered from them."""

    said: tuple[Message, ...]
    marked: tuple[Message, ...]
    prompt: Prepared


@dataclass(frozen=True)
class _Rest:
    """A conversation between two turns. text: rendered from `marked`. ids: the tokens of `text`; None where they are
    not known exactly."""

    said: tuple[Message, ...]
    marked: tuple[Message, ...]
    text: str
    ids: tuple[int, ...] | None


class Conversation:
    """At rest, or busy with one generation."""

    _keys = itertools.count(1)

    def __init__(self, prompts: Prompts, tokenizer: Tokenizer, first: pb.GenerateRequest) -> None:
        self.key = next(self._keys)  # under which the engine keeps its KV
        self.sampling = first.sampling
        self.salt = first.cache_salt
        self.priority = first.priority
        self.is_busy = False
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._rest: _Rest | None = None  # before the present turn
        self._turn = Turn((), (), Prepared([], ""))
        self._answer = ""
        self._answer_ids: list[int] = []
        self._num_heard: int | None = None

    def first(self, messages: list[Message], prompt: Prepared) -> Turn:
        """The turn that begins it."""
        return Turn(tuple(messages), tuple(messages), prompt)

    def ask(self, turn: Turn) -> None:
        """A generation for this turn begins."""
        self.is_busy = True
        self._turn = turn
        self._answer, self._answer_ids = "", []
        self._num_heard = None

    def interrupt(self, num_heard: int) -> None:
        """Of the present generation, which is being interrupted, so many tokens were heard."""
        self._num_heard = num_heard

    def hear(self, news: Chunk) -> None:
        """The present generation said something; its ending ends the turn."""
        self._answer += news.text
        self._answer_ids += [token.token_id for token in news.tokens]
        if news.ending is None:
            return
        self.is_busy = False
        if news.ending.reason == "interrupted":
            self._cut()
            return
        if news.ending.stop_token_id is not None:
            self._answer_ids.pop()  # the template writes it again
        ids = (*self._turn.prompt.ids, *self._answer_ids) if not news.ending.stop_string else None
        said = self._tokenizer.shield(self._answer)
        self._settle(said, said, ids)

    def roll_back(self) -> bool:
        """The present generation failed: as if it had not been asked. False: there is nothing to go back to."""
        self.is_busy = False
        return self._rest is not None

    async def continuation(self, messages: list[Message], field: str) -> Turn:
        """The turn that adds these messages. Raises ServerError about `field`."""
        rest = self._rest
        assert rest is not None
        said, marked = (*rest.said, *messages), (*rest.marked, *messages)
        if rest.ids is not None:
            text = await self._prompts.render(list(marked), True, field)
            if text.startswith(rest.text):
                delta = await self._prompts.encode(text[len(rest.text) :], add_bos=False, parse_special=True)
                if self._can_follow(delta):
                    return Turn(said, marked, Prepared([*rest.ids, *delta], text))
        text = await self._prompts.render(list(said), True, field)
        return Turn(said, said, Prepared(await self._prompts.encode(text, add_bos=False, parse_special=True), text))

    def _can_follow(self, delta: list[int]) -> bool:
        """Whether tokens of a text by itself are those that it has behind another: a tokeniser that puts a blank before
        every text puts none before a control token."""
        return not self._tokenizer.has_space_prefix or bool(delta and self._tokenizer.is_special(delta[0]))

    def _cut(self) -> None:
        ids = self._answer_ids[: self._num_heard]
        detokenizer = Detokenizer(self._tokenizer)
        said = self._tokenizer.shield(detokenizer.push(ids) + detokenizer.flush())
        mark = "".join(secrets.choice(string.digits) for _ in range(_MARK_DIGITS))
        self._settle(said, mark, (*self._turn.prompt.ids, *ids))

    def _settle(self, said: str, marked: str, ids: tuple[int, ...] | None) -> None:
        turn = self._turn
        self._rest = _Rest(
            (*turn.said, {"role": "assistant", "content": said}),
            (*turn.marked, {"role": "assistant", "content": marked}),
            turn.prompt.rendered + marked,
            ids,
        )
