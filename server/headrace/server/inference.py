"""Generate, Complete, Tokenize, Detokenize and Score; what they share with Session is `Starter`.

The life of a request: validate, open a guard, tokenise, reserve tokens, submit, send initial metadata; then messages as
the engine steps; in `finally`, stop what runs and give the guard back.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from headrace.engine.types import FinishOutput, TokenOutput
from headrace.server import convert, errors, validate
from headrace.server.admission import Admission, RequestGuard
from headrace.server.engine_client import Mailbox, TokenStream
from headrace.server.errors import ServerError
from headrace.server.generation import Chunk, ExpiredError, Generation
from headrace.server.model_host import ModelHost
from headrace.server.prompts import INLINE_TOKENS
from headrace.server.resume import Kept, Registry
from headrace.server.rpc import Call, Implementation
from headrace.server.starter import Start, Starter
from headrace.v1 import inference_pb2 as pb


class Running:
    """The generations of one RPC, by their streams. num_live: those that have not ended."""

    def __init__(self, mailbox: Mailbox, generations: Mapping[TokenStream, Generation]) -> None:
        self.num_live = len(generations)
        self._mailbox = mailbox
        self._generations = generations

    @property
    def generations(self) -> Iterable[Generation]:
        """All of them."""
        return self._generations.values()

    async def next(self, call: Call) -> list[tuple[Generation, Chunk]]:
        """What is new, after waiting for it; nothing where only an end was to be told. Lists, not an iterator of single
        chunks: most calls have one generation, and this runs once per token."""
        found = []
        for stream in await self._mailbox.wait():
            generation = self._generations[stream]
            if generation.ending is not None:
                continue
            try:
                news = generation.take()
            except ExpiredError:
                await call.expire()  # raises, or the client's own deadline ends the call
                raise
            if news is not None:
                self.num_live -= news.ending is not None
                found.append((generation, news))
        return found


class InferenceService:
    """headrace.v1.InferenceService."""

    def __init__(
        self, host: ModelHost, admission: Admission, starter: Starter, session: Implementation, resumables: Registry
    ) -> None:
        self._host = host
        self._admission = admission
        self._starter = starter
        self._session = session
        self._resumables = resumables

    def implementations(self) -> dict[str, Implementation]:
        """By method name."""
        return {
            "Generate": self.generate,
            "Resume": self.resume,
            "Cancel": self.cancel,
            "Complete": self.complete,
            "Session": self._session,
            "Tokenize": self.tokenize,
            "Detokenize": self.detokenize,
            "Score": self.score,
        }

    async def generate(self, request: pb.GenerateRequest, call: Call) -> None:
        """One message per step and generation."""
        validate.check_model(request.model, self._host.name)
        validate.generate(request, self._host.limits())
        if request.resumable:
            await self._generate_resumable(request, call)
            return
        async with self._run(request, call, "") as running:
            while running.num_live:
                for generation, news in await running.next(call):
                    await call.write_serialized(convert.generate_response(generation.index, news))

    async def resume(self, request: pb.ResumeRequest, call: Call) -> None:
        """The messages of a resumable generation, from an offset on."""
        validate.resume(request)
        kept = self._resumables.find(request.generation_id, call.tenant)
        call.facts["resumed_offset"] = request.next_offset
        await kept.follow(call, request.next_offset)

    async def cancel(self, request: pb.CancelRequest, call: Call) -> pb.CancelResponse:
        """Stop a resumable generation."""
        validate.resume(request)
        self._resumables.find(request.generation_id, call.tenant).cancel()
        return pb.CancelResponse()

    async def complete(self, request: pb.CompleteRequest, call: Call) -> pb.CompleteResponse:
        """All generations at once."""
        validate.check_model(request.request.model, self._host.name)
        validate.complete(request, self._host.limits())
        async with self._run(request.request, call, "request.") as running:
            answers = {g.index: pb.Completion(index=g.index) for g in running.generations}
            while running.num_live:
                for generation, news in await running.next(call):
                    answer, chunk = answers[generation.index], convert.chunk(generation.index, news)
                    answer.token_ids.extend(chunk.token_ids)
                    answer.text += chunk.text
                    answer.logprobs.extend(chunk.logprobs)
                    if chunk.HasField("finish"):
                        answer.finish.CopyFrom(chunk.finish)
        return pb.CompleteResponse(completions=[answers[index] for index in sorted(answers)])

    async def tokenize(self, request: pb.TokenizeRequest, call: Call) -> pb.TokenizeResponse:
        """The ids Generate would compute."""
        validate.check_model(request.model, self._host.name)
        validate.tokenize(request, self._host.limits())
        prompts = self._host.prompts()
        with self._admission.open(0):
            prepared = await prompts.prepare(request.prompt)
        call.facts["prompt_tokens"] = len(prepared.ids)
        return pb.TokenizeResponse(token_ids=prepared.ids, rendered=prompts.show(prepared))

    async def detokenize(self, request: pb.DetokenizeRequest, call: Call) -> pb.DetokenizeResponse:
        """The text of ids."""
        validate.check_model(request.model, self._host.name)
        limits, prompts = self._host.limits(), self._host.prompts()
        with self._admission.open(0):
            if len(request.token_ids) <= INLINE_TOKENS:
                validate.detokenize(request, limits)
            else:
                await prompts.in_thread(lambda: validate.detokenize(request, limits))
            ids = list(request.token_ids)
            text = await prompts.decode(ids, skip_special=request.skip_special_tokens)
        return pb.DetokenizeResponse(text=text)

    async def score(self, request: pb.ScoreRequest, call: Call) -> pb.ScoreResponse:
        """Log-probabilities of a text."""
        host = self._host
        validate.check_model(request.model, host.name)
        limits = host.limits()
        validate.score(request, limits)
        call.label = request.request_label
        call.facts.update(model=host.name, operation="score")
        claim = convert.claim(pb.PRIORITY_STANDARD, call.tenant, call.deadline)
        with self._admission.open(1, claim) as guard:
            prepared = await host.prompts().prepare(request.prompt)
            validate.check_score_length(len(prepared.ids), limits)
            guard.begin(len(prepared.ids), 0)
            common = convert.Common(prepared.ids, "", call.deadline, time.monotonic(), claim)
            mailbox = Mailbox(call.interrupt)
            stream = host.client().submit(partial(convert.score_sequence, common, request.top_logprobs), mailbox)
            stream.on_start = guard.started
            try:
                scored, end = await _collect(stream, mailbox)
            finally:
                stream.close()
        if end.reason == "expired":
            await call.expire()
        if end.reason == "error":
            raise ServerError(errors.NUMERIC) if end.error == "NUMERIC" else errors.new_incident()
        call.facts["prompt_tokens"] = len(prepared.ids)
        return convert.score_response(prepared.ids, scored, end)

    async def _generate_resumable(self, request: pb.GenerateRequest, call: Call) -> None:
        """One generation that outlives its call."""
        call.label = request.request_label
        guard = self._admission.open(1, convert.claim(request.priority, call.tenant, call.deadline))
        try:
            mailbox = Mailbox(lambda error: kept.cut_off(error))
            (generation,) = await self._submit(request, call, "", guard, mailbox)
            kept = Kept(self._resumables, generation.id, call.tenant, len(request.continuation.token_ids))
        except BaseException:
            guard.close()
            raise
        self._resumables.start(generation, mailbox, guard, kept)
        try:
            await kept.follow(call, kept.first_offset)
        finally:
            _note_endings(call, [generation])

    @asynccontextmanager
    async def _run(self, request: pb.GenerateRequest, call: Call, path: str) -> AsyncIterator[Running]:
        """The request's generations, admitted and running; stopped and given back at the end, however it comes."""
        call.label = request.request_label
        generations: dict[TokenStream, Generation] = {}
        claim = convert.claim(request.priority, call.tenant, call.deadline)
        guard: RequestGuard = self._admission.open(request.sampling.n or 1, claim)
        try:
            mailbox = Mailbox(call.interrupt)
            for generation in await self._submit(request, call, path, guard, mailbox):
                assert generation.stream is not None
                generations[generation.stream] = generation
            await call.admit()
            yield Running(mailbox, generations)
        finally:
            for generation in generations.values():
                generation.close()
            guard.close()
            _note_endings(call, generations.values())

    async def _submit(
        self, request: pb.GenerateRequest, call: Call, path: str, guard: RequestGuard, mailbox: Mailbox
    ) -> list[Generation]:
        """The request's generations, running. Raises ServerError, and has started nothing then."""
        prepared = await self._host.prompts().prepare(request.prompt, f"{path}prompt")
        start = Start(
            prepared.ids,
            request.sampling,
            request.cache_salt,
            call.deadline,
            path,
            continuation=request.continuation if request.HasField("continuation") else None,
            tells_origin=request.resumable,
        )
        generations = self._starter.submit(start, guard, mailbox)
        if guard.capped_to:
            call.tell("headrace-max-tokens", str(guard.capped_to))
        call.facts.update(
            model=self._host.name,
            operation="chat" if request.prompt.WhichOneof("form") == "chat" else "text_completion",
            prompt_tokens=len(prepared.ids),
            n=len(generations),
            max_tokens=generations[0].max_tokens,
            temperature=request.sampling.temperature if request.sampling.HasField("temperature") else 1.0,
        )
        return generations


async def _collect(stream: TokenStream, mailbox: Mailbox) -> tuple[list[TokenOutput], FinishOutput]:
    """All tokens of a scored text."""
    tokens: list[TokenOutput] = []
    while True:
        await mailbox.wait()
        taken = stream.take()
        tokens += taken.tokens
        if taken.finish is not None:
            return tokens, taken.finish


def _note_endings(call: Call, generations: Iterable[Generation]) -> None:
    endings = [g.ending for g in generations if g.ending is not None]
    if endings:
        call.facts["generated_tokens"] = sum(ending.num_generated_tokens for ending in endings)
        call.facts["cached_tokens"] = endings[0].num_cached_tokens
        call.facts["finish"] = endings[0].reason
        call.facts["queue_seconds"] = round(max(ending.queue_seconds for ending in endings), 6)
        call.facts["prefill_seconds"] = round(max(ending.prefill_seconds for ending in endings), 6)
        call.facts["decode_seconds"] = round(max(ending.decode_seconds for ending in endings), 6)
