"""OpenAI's own client against the gateway: what it reads is what gRPC says, and what it aborts is freed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.gateway.conftest import Http, gateway
from tests.server import scripted_engine
from tests.server.support import bench, drained, ids_of, text_of, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

HELLO: Any = [{"role": "user", "content": "hello"}]


async def test_a_completion_is_what_grpc_says(tiny_http: Http) -> None:
    request = tokens_request([5, 6, 7], max_tokens=12, ignore_eos=True)
    expected = await drained(tiny_http.server.stub.Generate(request))
    answer = await tiny_http.openai.completions.create(
        model="tiny",
        prompt=[5, 6, 7],
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True, "priority": "batch"},
    )
    assert answer.choices[0].text == text_of(expected)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, len(ids_of(expected)))


async def test_a_chat_streams_to_the_same_text(tiny_http: Http) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 9, "seed": 3}
    whole = await tiny_http.openai.chat.completions.create(**options)
    stream = await tiny_http.openai.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert deltas[0].delta.role == "assistant"
    assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_n_and_several_prompts_keep_their_places(tiny_http: Http) -> None:
    options: Any = {"model": "", "prompt": ["a", "b"], "n": 2, "max_tokens": 5, "seed": 1}
    whole = await tiny_http.openai.completions.create(**options)
    texts = [""] * 4
    async for chunk in await tiny_http.openai.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1


async def test_logprobs_name_tokens_and_alternatives(tiny_http: Http) -> None:
    answer = await tiny_http.openai.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    entries = logprobs.content or []
    assert len(entries) == 3
    for entry in entries:
        assert (entry.token, entry.logprob) == (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob)
        assert len(entry.top_logprobs) == 2
    old = await tiny_http.openai.completions.create(model="tiny", prompt="x", max_tokens=3, temperature=0, logprobs=1)
    assert old.choices[0].logprobs is not None
    assert len(old.choices[0].logprobs.tokens or []) == 3


async def test_models(http: Http) -> None:
    listed = [model async for model in http.openai.models.list()]
    assert [model.id for model in listed] == ["tiny"]
    assert (await http.openai.models.retrieve("tiny")).owned_by == "headrace"
    with pytest.raises(openai.NotFoundError):
        await http.openai.models.retrieve("nothing")


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 200}, "temperature", "INVALID_REQUEST"),
        ({"max_tokens": "many"}, "max_tokens", "INVALID_REQUEST"),
        ({"messages": []}, "messages", "INVALID_REQUEST"),
        ({"extra_body": {"tools": []}}, "tools", "INVALID_REQUEST"),
        ({"extra_body": {"priority": "urgent"}}, "priority", "INVALID_REQUEST"),
        ({"top_logprobs": 3}, "top_logprobs", "INVALID_REQUEST"),
        ({"logprobs": True, "top_logprobs": 30}, "top_logprobs", "INVALID_REQUEST"),
        ({"max_tokens": 510}, None, "PROMPT_TOO_LONG"),
    ],
)
async def test_bad_requests_are_refused_in_openais_form(
    http: Http, change: dict[str, Any], param: str | None, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await http.openai.chat.completions.create(**{"model": "tiny", "messages": HELLO, **change})
    body: Any = caught.value.body
    assert body["code"] == code
    assert body["type"] == "invalid_request_error"
    if param is not None:
        assert body["param"] == param
    with pytest.raises(openai.BadRequestError):  # before a stream begins, so as a status
        await http.openai.chat.completions.create(**{"model": "tiny", "messages": HELLO, "stream": True, **change})


async def test_an_unknown_model(http: Http) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await http.openai.chat.completions.create(model="other", messages=HELLO)
    assert missing.value.code == "MODEL_NOT_FOUND"


async def test_a_failure_is_a_status_or_an_event(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02)) as server, gateway(server) as http:
        with pytest.raises(openai.InternalServerError) as caught:
            await http.openai.completions.create(model="tiny", prompt=[scripted_engine.NAN], max_tokens=9)
        assert caught.value.code == "NUMERIC"
        stream = await http.openai.completions.create(model="tiny", prompt=[10], max_tokens=400, stream=True)
        await anext(aiter(stream))
        assert server.running.host.supervisor.pid is not None
        os.kill(server.running.host.supervisor.pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine stopped"):
            async for _ in stream:
                pass


async def test_a_client_that_goes_away_frees_its_sequences(http: Http) -> None:
    stream = await http.openai.completions.create(model="tiny", prompt=[10], max_tokens=400, stream=True)
    await anext(aiter(stream))
    before = (await http.server.stats()).num_steps
    await stream.close()
    assert (await http.server.idle_stats()).num_steps - before < 200
    waiting = asyncio.ensure_future(http.openai.completions.create(model="tiny", prompt=[10], max_tokens=400))
    await until(lambda: http.server.running.admission.stats().num_live > 0)
    waiting.cancel()
    await http.server.idle_stats()


async def test_the_stream_ends_as_openais(http: Http) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(http.url.rsplit(":", 1)[1]))
    body = json.dumps({"prompt": [10], "max_tokens": 2, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
    text = (await reader.read()).decode()
    writer.close()
    assert "content-type: text/event-stream" in text
    assert "data: [DONE]\n\n" in text
