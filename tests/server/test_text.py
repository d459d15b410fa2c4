"""Tokenize, Detokenize and Score on the real tiny model."""

from __future__ import annotations

import math

import pytest
from headrace.v1 import inference_pb2 as pb

from tests.server.support import Bench, chat_prompt, drained, ids_of, tokens_request

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.mark.parametrize("text", ["The headrace", "Größe 🙂 東京", "<|im_start|>", " \n\t ", "x" * 5000, "a\x00b"])
async def test_text_survives_the_round_trip(tiny: Bench, text: str) -> None:
    tokenized = await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text=text)))
    assert tokenized.rendered == text
    detokenized = await tiny.stub.Detokenize(pb.DetokenizeRequest(token_ids=tokenized.token_ids))
    assert detokenized.text == text


async def test_special_tokens_are_made_by_templates_and_not_by_text(tiny: Bench) -> None:
    text = await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="<|im_start|>")))
    assert 1 not in text.token_ids
    chat = await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=chat_prompt("hi")))
    assert chat.rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert [token for token in chat.token_ids if token in (1, 2)] == [1, 2, 1]
    no_cue = pb.TokenizeRequest(prompt=chat_prompt("hi"))
    no_cue.prompt.chat.omit_generation_prompt = True
    assert (await tiny.stub.Tokenize(no_cue)).rendered == "<|im_start|>user\nhi<|im_end|>\n"


async def test_bytes_that_are_not_utf8_become_replacement_characters(tiny: Bench) -> None:
    euro = (await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="€")))).token_ids
    assert len(euro) == 3
    broken = await tiny.stub.Detokenize(pb.DetokenizeRequest(token_ids=euro[:2]))
    assert set(broken.text) == {"\ufffd"}
    special = pb.DetokenizeRequest(token_ids=[1, *euro, 2])
    assert (await tiny.stub.Detokenize(special)).text == "<|im_start|>€<|im_end|>"
    special.skip_special_tokens = True
    assert (await tiny.stub.Detokenize(special)).text == "€"


async def test_score_gives_what_generate_said(tiny: Bench) -> None:
    """A greedy answer's log-probabilities, scored as text, are the same numbers."""
    prompt = [10, 20, 30]
    responses = await drained(tiny.stub.Generate(tokens_request(prompt, max_tokens=10, logprobs=2)))
    said = [entry for response in responses for entry in response.chunk.logprobs]
    ids = prompt + ids_of(responses)
    request = pb.ScoreRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids)), top_logprobs=2)
    scored = await tiny.stub.Score(request)
    assert list(scored.token_ids) == ids
    assert [entry.token_id for entry in scored.logprobs] == ids[1:]
    for mine, theirs in zip(scored.logprobs[2:], said, strict=True):
        assert math.isclose(mine.logprob, theirs.logprob, rel_tol=1e-4, abs_tol=1e-5)
        assert [a.token_id for a in mine.alternatives] == [a.token_id for a in theirs.alternatives]
    assert scored.usage.prompt_tokens == len(ids)
    assert scored.usage.generated_tokens == 0


async def test_a_text_of_many_chunks_is_scored_whole(tiny: Bench) -> None:
    ids = [3 + (7 * index) % 250 for index in range(512)]
    scored = await tiny.stub.Score(pb.ScoreRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=ids))))
    assert [entry.token_id for entry in scored.logprobs] == ids[1:]
    assert all(entry.logprob < 0 and not entry.alternatives for entry in scored.logprobs)
