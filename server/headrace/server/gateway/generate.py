"""OpenAI's chat completions and completions over the gRPC client: one request becomes one call per prompt.

Streams are server-sent events. A client that goes away closes its stream, and so its calls; their sequences are freed
in the engine at once.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any, cast

from headrace.client import AsyncClient, Chunk, Completion, HeadraceError, TokenLogprob
from headrace.client.aio_generation import AsyncGeneration
from headrace.client.types import Finish, Sampling
from headrace.server.gateway import errors
from headrace.server.gateway.errors import Problem, ProblemError
from headrace.server.gateway.schema import ChatRequest, CompletionRequest

_SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "seed", "max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos", "n"),
)
_MAX_PROMPTS = 64  # of one /v1/completions


@dataclass(frozen=True)
class Prompt:
    """One call's worth of a request: exactly one form is set."""

    text: str | None = None
    messages: list[dict[str, str]] | None = None
    token_ids: Sequence[int] | None = None


@dataclass
class Answer:
    """What is the same in all of a request's objects; and its usage, which grows as generations end."""

    kind: str  # "chat.completion" or "text_completion"
    model: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    finishes: list[tuple[int, Finish]] = field(default_factory=list)  # with the prompt's number

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat.completion"

    def head(self, *, is_chunk: bool) -> dict[str, Any]:
        """The fields that every object has."""
        prefix = "chatcmpl" if self.is_chat else "cmpl"
        kind = f"{self.kind}.chunk" if is_chunk and self.is_chat else self.kind
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def usage(self) -> dict[str, Any]:
        """Tokens of all generations; a prompt counts once."""
        prompts = {number: finish.usage for number, finish in self.finishes}
        prompt = sum(usage.prompt_tokens for usage in prompts.values())
        output = sum(finish.usage.generated_tokens for _, finish in self.finishes)
        cached = sum(usage.cached_prompt_tokens for usage in prompts.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class Generator:
    """Answers requests through one client."""

    def __init__(self, client: AsyncClient, texts: Callable[[Sequence[int], str], Any]) -> None:
        """texts: an async function from token ids and a model to the text of each; for log-probabilities."""
        self._client = client
        self._texts = texts

    async def answer(
        self, request: ChatRequest | CompletionRequest, metadata: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """The whole answer. Raises HeadraceError or ProblemError."""
        prompts, answer = _prompts(request), _answer(request)
        calls = [self._client.complete(**_call(prompt, request, metadata)) for prompt in prompts]
        choices = []
        for number, completions in enumerate(await _all(calls)):
            for completion in completions:
                answer.finishes.append((number, completion.finish))
                index = number * (request.n or 1) + completion.index
                choices.append(await self._choice(answer, request, index, completion))
        return {**answer.head(is_chunk=False), "choices": choices, "usage": answer.usage()}

    async def stream(
        self, request: ChatRequest | CompletionRequest, metadata: Sequence[tuple[str, str]]
    ) -> AsyncIterator[str]:
        """Server-sent events. Raises what is refused before it gives the first; a later failure is an event."""
        prompts, answer = _prompts(request), _answer(request)
        events = self._events(prompts, request, answer, metadata)
        first = await anext(events)

        async def lines() -> AsyncIterator[str]:
            try:
                yield _event(first)
                async for event in events:
                    yield _event(event)
                if request.stream_options is not None and request.stream_options.include_usage:
                    yield _event({**answer.head(is_chunk=True), "choices": [], "usage": answer.usage()})
            except HeadraceError as error:
                yield _event(errors.from_server(error).body())
            finally:
                await events.aclose()
            yield "data: [DONE]\n\n"

        return lines()

    async def _events(
        self,
        prompts: Sequence[Prompt],
        request: ChatRequest | CompletionRequest,
        answer: Answer,
        metadata: Sequence[tuple[str, str]],
    ) -> Any:
        """The chunks of all prompts as they come."""
        async with AsyncExitStack() as stack:
            streams = [
                await stack.enter_async_context(self._client.generate(**_call(prompt, request, metadata)))
                for prompt in prompts
            ]
            seen: set[int] = set()
            async for number, chunk in _merged(streams):
                index = number * (request.n or 1) + chunk.index
                if chunk.finish is not None:
                    answer.finishes.append((number, chunk.finish))
                yield await self._delta(answer, request, index, chunk, is_first=index not in seen)
                seen.add(index)

    async def _choice(
        self, answer: Answer, request: ChatRequest | CompletionRequest, index: int, completion: Completion
    ) -> dict[str, Any]:
        logprobs = await self._logprobs(request, completion.logprobs)
        reason = _reason(completion.finish)
        if answer.is_chat:
            message = {"role": "assistant", "content": completion.text, "refusal": None}
            return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}
        return {"index": index, "text": completion.text, "logprobs": logprobs, "finish_reason": reason}

    async def _delta(
        self, answer: Answer, request: ChatRequest | CompletionRequest, index: int, chunk: Chunk, *, is_first: bool
    ) -> dict[str, Any]:
        logprobs = await self._logprobs(request, chunk.logprobs)
        reason = _reason(chunk.finish) if chunk.finish is not None else None
        if answer.is_chat:
            delta = {"role": "assistant", "content": chunk.text} if is_first else {"content": chunk.text}
            choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        else:
            choice = {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": reason}
        body = {**answer.head(is_chunk=True), "choices": [choice]}
        if request.stream_options is not None and request.stream_options.include_usage:
            body["usage"] = None  # as OpenAI's: there, and empty until the last
        return body

    async def _logprobs(
        self, request: ChatRequest | CompletionRequest, logprobs: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        if not logprobs:
            return None
        ids = [i for entry in logprobs for i in (entry.token_id, *(other.token_id for other in entry.alternatives))]
        texts = dict(zip(ids, await self._texts(ids, request.model), strict=True))
        if isinstance(request, ChatRequest):
            return {"content": [_chat_logprob(entry, texts) for entry in logprobs], "refusal": None}
        return {
            "tokens": [texts[entry.token_id] for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [{texts[o.token_id]: o.logprob for o in entry.alternatives} for entry in logprobs],
        }


def _chat_logprob(entry: TokenLogprob, texts: dict[int, str]) -> dict[str, Any]:
    def one(token_id: int, logprob: float) -> dict[str, Any]:
        text = texts[token_id]
        is_whole = "\N{REPLACEMENT CHARACTER}" not in text  # else a part of a character, whose bytes nobody told us
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if is_whole else None}

    top = [one(other.token_id, other.logprob) for other in entry.alternatives]
    return {**one(entry.token_id, entry.logprob), "top_logprobs": top}


def _prompts(request: ChatRequest | CompletionRequest) -> list[Prompt]:
    if isinstance(request, ChatRequest):
        roles = {"developer": "system"}
        return [Prompt(messages=[{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages])]
    prompt = request.prompt
    if isinstance(prompt, str):
        return [Prompt(text=prompt)]
    if not prompt:
        raise ProblemError(Problem(400, "prompt: must not be empty", "prompt", "INVALID_REQUEST"))
    if isinstance(prompt[0], int):
        return [Prompt(token_ids=prompt)]
    if len(prompt) > _MAX_PROMPTS:
        raise ProblemError(Problem(400, f"prompt: at most {_MAX_PROMPTS} prompts", "prompt", "INVALID_REQUEST"))
    return [Prompt(text=one) if isinstance(one, str) else Prompt(token_ids=one) for one in prompt]


def _answer(request: ChatRequest | CompletionRequest) -> Answer:
    return Answer("chat.completion" if isinstance(request, ChatRequest) else "text_completion", request.model)


def _call(
    prompt: Prompt, request: ChatRequest | CompletionRequest, metadata: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Arguments of the client's `complete` or `generate`."""
    return {
        "prompt": prompt.text,
        "messages": prompt.messages,
        "token_ids": prompt.token_ids,
        "model": request.model,
        "cache_salt": request.cache_salt,
        "priority": request.priority,
        "metadata": metadata,
        **_sampling(request),
    }


def _sampling(request: ChatRequest | CompletionRequest) -> Sampling:
    values = {name: getattr(request, name) for name in _SAMPLING if getattr(request, name) is not None}
    if isinstance(request, ChatRequest):
        if request.max_completion_tokens is not None:
            values["max_tokens"] = request.max_completion_tokens
        if request.top_logprobs is not None and not request.logprobs:
            raise ProblemError(Problem(400, "top_logprobs: needs logprobs", "top_logprobs", "INVALID_REQUEST"))
        if request.logprobs:
            values["logprobs"] = request.top_logprobs or 0
    elif request.logprobs is not None:
        values["logprobs"] = request.logprobs
    return cast(Sampling, values)


def _reason(finish: Finish) -> str:
    return "length" if finish.reason == "length" else "stop"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _all(calls: Any) -> list[list[Completion]]:
    """All results; where one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        results: list[list[Completion]] = await asyncio.gather(*tasks)
        return results
    finally:
        for task in tasks:
            task.cancel()


async def _merged(streams: Sequence[AsyncGeneration]) -> AsyncIterator[tuple[int, Chunk]]:
    """Chunks of several streams as they come, with the number of the stream."""

    async def take(number: int) -> tuple[int, Chunk | None]:
        return number, await anext(streams[number], None)

    pending = {asyncio.ensure_future(take(number)) for number in range(len(streams))}
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, chunk = task.result()
                if chunk is not None:
                    pending.add(asyncio.ensure_future(take(number)))
                    yield number, chunk
    finally:
        for task in pending:
            task.cancel()
