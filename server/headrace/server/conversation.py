"""A chat that a session keeps: its messages and the exact tokens the engine has seen, so that the prefix cache hits.

The next turn's prompt is the chat template's text of the whole conversation. Where that text begins with what the
engine has seen already, the known tokens are taken as they are and only the rest is tokenised; tokenising everything
anew could cut the answer's text into other tokens than the model chose, and would miss the cache. Where it does not (a
template that trims, an answer cut by a stop string), everything is tokenised anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from headrace.models.tokenizer import Tokenizer
from headrace.server.generation import Chunk
from headrace.server.prompts import Prepared, Prompts
from headrace.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class _Turns:
    """A conversation at rest, its texts shielded (`Prompts.messages`). ids: the tokens of `text`; None where they are
    not known exactly."""

    messages: tuple[dict[str, str], ...]
    text: str
    ids: tuple[int, ...] | None


class Conversation:
    """At rest, or busy with one generation."""

    def __init__(self, prompts: Prompts, tokenizer: Tokenizer, first: pb.GenerateRequest) -> None:
        self.sampling = first.sampling
        self.salt = first.cache_salt
        self.is_busy = False
        self._prompts = prompts
        self._tokenizer = tokenizer
        self._rest: _Turns | None = None  # before the present turn
        self._asked: tuple[dict[str, str], ...] = ()
        self._prompt = Prepared([], "")
        self._answer = ""
        self._answer_ids: list[int] = []

    def ask(self, messages: list[dict[str, str]], prompt: Prepared) -> None:
        """A generation for these new messages begins; `prompt` is what the engine gets."""
        self.is_busy = True
        self._asked = (*(self._rest.messages if self._rest else ()), *messages)
        self._prompt = prompt
        self._answer, self._answer_ids = "", []

    def hear(self, news: Chunk) -> None:
        """The present generation said something; its ending ends the turn."""
        self._answer += news.text
        self._answer_ids += [token.token_id for token in news.tokens]
        if news.ending is None:
            return
        if news.ending.stop_token_id is not None:
            self._answer_ids.pop()  # the template writes it again
        answer = self._tokenizer.shield(self._answer)
        self._rest = _Turns(
            (*self._asked, {"role": "assistant", "content": answer}),
            self._prompt.rendered + answer,
            (*self._prompt.ids, *self._answer_ids) if not news.ending.stop_string else None,
        )
        self.is_busy = False

    def roll_back(self) -> bool:
        """The present generation failed: as if it had not been asked. False: there is nothing to go back to."""
        self.is_busy = False
        return self._rest is not None

    async def continuation(self, messages: list[dict[str, str]], field: str) -> Prepared:
        """The prompt for the conversation with these turns added. Raises ServerError about `field`."""
        rest = self._rest
        assert rest is not None
        text = await self._prompts.render([*rest.messages, *messages], True, field)
        # A tokeniser that puts a blank before every text would put one before the delta.
        can_join = rest.ids is not None and not self._tokenizer.has_space_prefix
        if can_join and rest.ids is not None and text.startswith(rest.text):
            delta = await self._prompts.encode(text[len(rest.text) :], add_bos=False, parse_special=True)
            return Prepared([*rest.ids, *delta], text)
        return Prepared(await self._prompts.encode(text, add_bos=False, parse_special=True), text)
