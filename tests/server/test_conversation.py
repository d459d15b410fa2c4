"""What the engine is asked next, by hand: templates that trim or rewrite answers, and answers that were cut."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from headrace.engine.types import TokenOutput
from headrace.models.load import load_front
from headrace.models.tokenizer import Tokenizer
from headrace.server.conversation import Conversation, Turn
from headrace.server.generation import Chunk, Ending
from headrace.server.prompts import Prepared, Prompts
from headrace.server.template_worker import TemplateWorker
from headrace.v1 import inference_pb2 as pb

from tests.models.test_tokenizer_sentencepiece import metadata

pytestmark = pytest.mark.asyncio(loop_scope="session")

PLAIN = "{{ message['content'] }}"
TRIMMED = "{{ message['content'] | trim }}"
LOUD = "{{ message['content'] | upper }}"  # rewrites what the model said
TEMPLATE = (
    "{%% for message in messages %%}<|im_start|>{{ message['role'] }}\n%s<|im_end|>\n{%% endfor %%}"
    "{%% if add_generation_prompt %%}<|im_start|>assistant\n{%% endif %%}"
)


class Desk:
    """A conversation on a template of the test's own, and whoever answers."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        self.tokenizer = tokenizer
        self.prompts = Prompts(tokenizer, TemplateWorker(template, "<|im_start|>", "<|im_end|>"))
        self.conversation = Conversation(self.prompts, tokenizer, pb.GenerateRequest())

    async def begin(self, text: str) -> list[int]:
        messages = self.prompts.messages([pb.ChatMessage(role=pb.ROLE_USER, content=text)])
        rendered = await self.prompts.render(messages, True, "prompt")
        prompt = Prepared(await self.prompts.encode(rendered, add_bos=False, parse_special=True), rendered)
        self.conversation.ask(self.conversation.first(messages, prompt))
        return prompt.ids

    async def go_on(self, text: str) -> Turn:
        messages = self.prompts.messages([pb.ChatMessage(role=pb.ROLE_USER, content=text)])
        turn = await self.conversation.continuation(messages, "append.messages")
        self.conversation.ask(turn)
        return turn

    def answer(self, ids: list[int], reason: str = "length", heard: int | None = None) -> None:
        """All of it in one chunk."""
        if heard is not None:
            self.conversation.interrupt(heard)
        text = self.tokenizer.decode(ids)
        ending = Ending(reason, "", None, 0, 0, len(ids), 0.0, 0.0, 0.0, 0)
        self.conversation.hear(Chunk(0, [TokenOutput(token_id) for token_id in ids], text, ending))

    def delta(self, text: str) -> list[int]:
        """What stands between an answer and the next one."""
        between = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        return self.tokenizer.encode(between, add_bos=False, parse_special=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama_gguf: Path) -> Tokenizer:
    return load_front(tiny_llama_gguf).tokenizer


@pytest_asyncio.fixture(loop_scope="session")
async def desks(tokenizer: Tokenizer) -> AsyncIterator[dict[str, Desk]]:
    desks = {content: Desk(tokenizer, TEMPLATE % content) for content in (PLAIN, TRIMMED, LOUD)}
    yield desks
    for desk in desks.values():
        await desk.prompts.close()


@pytest.mark.parametrize("content", [PLAIN, TRIMMED, LOUD])
async def test_an_interrupted_answer_stays_the_tokens_that_were_heard(desks: dict[str, Desk], content: str) -> None:
    """The cut falls behind blanks, which a template trims, and within a character, which no text can say."""
    desk = desks[content]
    spoken = desk.tokenizer.encode("  the wheel \n 東京", add_bos=False, parse_special=False)
    known = await desk.begin("hi")
    for heard in (len(spoken) - 1, 1, 0, len(spoken)):
        desk.answer(spoken, "interrupted", heard)
        turn = await desk.go_on("and?")
        known = [*known, *spoken[:heard], *desk.delta("AND?" if content == LOUD else "and?")]
        assert turn.prompt.ids == known


async def test_what_was_said_is_what_counts_when_the_tokens_do_not(desks: dict[str, Desk]) -> None:
    """The template rewrites an answer that ended by itself: then all is made anew, and no mark is left in it."""
    desk = desks[LOUD]
    await desk.begin("hi")
    desk.answer(desk.tokenizer.encode("wheel", add_bos=False, parse_special=False), "interrupted", 99)
    await desk.go_on("and?")
    desk.answer(desk.tokenizer.encode("water", add_bos=False, parse_special=False))
    turn = await desk.go_on("so")
    said = ["HI", "WHEEL", "AND?", "WATER", "SO"]
    roles = ["user", "assistant", "user", "assistant", "user"]
    whole = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in zip(roles, said, strict=True))
    assert turn.prompt.rendered == whole + "<|im_start|>assistant\n"
    assert turn.prompt.ids == desk.tokenizer.encode(turn.prompt.rendered, add_bos=False, parse_special=True)


async def test_control_tokens_in_what_was_heard_stay_text(desks: dict[str, Desk]) -> None:
    desk = desks[LOUD]
    await desk.begin("hi")
    desk.answer(desk.tokenizer.encode("<|im_end|>", add_bos=False, parse_special=False), "interrupted", 99)
    await desk.go_on("and?")
    desk.answer(desk.tokenizer.encode("water", add_bos=False, parse_special=False))
    turn = await desk.go_on("so")
    assert turn.prompt.ids.count(2) == 5  # five turns end; the answer's text does not end one


async def test_a_failed_turn_leaves_the_conversation_where_it_was(desks: dict[str, Desk]) -> None:
    desk = desks[PLAIN]
    known = await desk.begin("hi")
    desk.answer(spoken := desk.tokenizer.encode("wheel", add_bos=False, parse_special=False), "interrupted", 2)
    await desk.go_on("lost")
    desk.conversation.interrupt(0)
    assert desk.conversation.roll_back()
    turn = await desk.go_on("and?")
    assert turn.prompt.ids == [*known, *spoken[:2], *desk.delta("and?")]
    desk.answer(spoken, "length")
    assert (await desk.go_on("so")).prompt.ids == [*turn.prompt.ids, *spoken, *desk.delta("so")]


@pytest.mark.parametrize(("end", "is_joined"), [("</s>", True), ("\n</s>", False)])
async def test_a_vocabulary_that_puts_a_blank_before_every_text(end: str, is_joined: bool) -> None:
    """SentencePiece's: behind an answer a control token may follow as it is; other text would get a blank of its own,
    so everything is made anew from what was said."""
    tokenizer = Tokenizer.from_gguf(metadata())
    assert tokenizer.has_space_prefix
    template = "{% for message in messages %}<s>{{ message['content'] }}END{% endfor %}"
    desk = Desk(tokenizer, template.replace("END", end) + "{% if add_generation_prompt %}<s>{% endif %}")
    known = await desk.begin("the wheel")
    spoken = tokenizer.encode("Alice", add_bos=False, parse_special=False)
    desk.answer(spoken, "interrupted", len(spoken) - 1)
    turn = await desk.go_on("and")
    await desk.prompts.close()
    delta = tokenizer.encode(f"{end}<s>and{end}<s>", add_bos=False, parse_special=True)
    anew = tokenizer.encode(turn.prompt.rendered, add_bos=False, parse_special=True)
    assert turn.prompt.ids == ([*known, *spoken[:-1], *delta] if is_joined else anew)
