"""From a request's prompt to token ids: chat template, tokeniser. Used by all servicers that take a prompt.

Neither may hold up the event loop: templates are rendered by a killable process (they come with the model and are not
trusted), long texts are tokenised in threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from headrace.models.chat_template import MessagesRefusedError
from headrace.models.errors import TemplateError, TokenizerError
from headrace.models.tokenizer import Tokenizer
from headrace.server import errors, telemetry
from headrace.server.errors import InvalidRequestError, ServerError, Violation
from headrace.server.template_worker import TemplateWorker
from headrace.v1 import inference_pb2 as pb

log = logging.getLogger("headrace.server")

# Tokenising runs at some MB/s, so this is about 1 ms; a longer text goes to a thread.
_INLINE_CHARACTERS = 4096
INLINE_TOKENS = 1024
T = TypeVar("T")
ROLE_NAMES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}


@dataclass(frozen=True)
class Prepared:
    """Token ids of a prompt, and the text they stand for ("" where the prompt came as ids).

    The text of a chat carries the marks of `Tokenizer.shield`; `Prompts.show` takes them off.
    """

    ids: list[int]
    rendered: str


class Prompts:
    """Renders and tokenises for one model."""

    def __init__(self, tokenizer: Tokenizer, template: TemplateWorker | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    async def prepare(self, prompt: pb.Prompt, field: str = "prompt") -> Prepared:
        """A validated prompt's ids. field: its path, for faults. Raises ServerError."""
        form = prompt.WhichOneof("form")
        telemetry.begin("chat" if form == "chat" else "text_completion")
        if form == "tokens":
            return Prepared(list(prompt.tokens.ids), "")
        with telemetry.child_span("tokenize"):
            return await self._prepare_text(prompt, form, field)

    async def _prepare_text(self, prompt: pb.Prompt, form: str | None, field: str) -> Prepared:
        if form == "text":
            ids = await self.encode(prompt.text, add_bos=self._tokenizer.add_bos, parse_special=False)
            return Prepared(ids, prompt.text)
        messages = self.messages(prompt.chat.messages)
        rendered = await self.render(messages, not prompt.chat.omit_generation_prompt, f"{field}.chat.messages")
        # The template writes the BOS token itself where the model wants one.
        return Prepared(await self.encode(rendered, add_bos=False, parse_special=True), rendered)

    def messages(self, messages: Iterable[pb.ChatMessage]) -> list[dict[str, str]]:
        """Chat messages as templates expect them; control tokens that a user wrote out stay text in the rendering."""
        shield = self._tokenizer.shield
        return [{"role": ROLE_NAMES[message.role], "content": shield(message.content)} for message in messages]

    def show(self, prepared: Prepared) -> str:
        """The text of a prompt as a client may see it."""
        return self._tokenizer.unshield(prepared.rendered)

    async def render(self, messages: list[dict[str, str]], add_generation_prompt: bool, field: str) -> str:
        """The conversation as text. Raises NO_CHAT_TEMPLATE, TEMPLATE_FAILED, or TEMPLATE_REFUSED about `field`."""
        if self._template is None:
            raise ServerError(errors.NO_CHAT_TEMPLATE)
        try:
            return await self._template.render(messages, add_generation_prompt)
        except MessagesRefusedError:
            violation = Violation(field, "the model's chat template refuses these messages", "CONFLICT")
            raise InvalidRequestError([violation], errors.TEMPLATE_REFUSED) from None
        except TemplateError as error:
            log.warning("a chat template failed: %s", error)
            raise ServerError(errors.TEMPLATE_FAILED) from None

    async def encode(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        try:
            if len(text) <= _INLINE_CHARACTERS:
                return self._tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)
            return await self.in_thread(
                lambda: self._tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)
            )
        except TokenizerError:
            violation = Violation("prompt", "cannot be tokenised", "BAD_CHARACTER")
            raise InvalidRequestError([violation]) from None

    async def decode(self, ids: list[int], *, skip_special: bool) -> str:
        """The text of token ids, U+FFFD where they are not UTF-8."""
        if len(ids) <= INLINE_TOKENS:
            return self._tokenizer.decode(ids, skip_special=skip_special)
        return await self.in_thread(lambda: self._tokenizer.decode(ids, skip_special=skip_special))

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run what takes long beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Stop the threads and the template process."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._template is not None:
            await self._template.close()
