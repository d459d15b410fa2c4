"""Resumable generations: what a client gets that lost its connection, on the same server and on another one."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.support import (
    PATIENCE,
    Bench,
    bench,
    drained,
    failure,
    failure_of,
    finish_of,
    ids_of,
    text_of,
    tokens_request,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

TENANT = "x-tenant"
DIGEST = "0" * 64


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def _slow(tiny_llama_gguf: Path) -> AsyncIterator[Bench]:
    command = scripted_engine.command(step_seconds=0.005)
    async with bench(tiny_llama_gguf, command, tenant_header=TENANT) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def slow(_slow: Bench) -> AsyncIterator[Bench]:
    """The counting engine, 5 ms a token: a call can be left half-way. Everything must be given back after each test."""
    yield _slow
    stats = await _slow.idle_stats()
    assert stats.num_free_blocks == stats.num_total_blocks


def _resumable(ids: Sequence[int] = (20,), **sampling: Any) -> pb.GenerateRequest:
    request = tokens_request(ids, **{"seed": 7, "max_tokens": 60, **sampling})
    request.resumable = True
    return request


async def _some(call: Any, count: int) -> list[Any]:
    """The first messages of a stream."""
    return [await asyncio.wait_for(call.read(), PATIENCE) for _ in range(count)]


async def _rest(call: Any) -> list[Any]:
    """The messages of a stream that `_some` was read of."""
    messages = []
    while (message := await asyncio.wait_for(call.read(), PATIENCE)) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def _left(server: Bench, request: pb.GenerateRequest, count: int) -> list[Any]:
    """The first messages of a call that then vanishes."""
    call = server.stub.Generate(request)
    taken = await _some(call, count)
    call.cancel()
    return taken


def _chunks(responses: Sequence[Any]) -> list[pb.GenerationChunk]:
    """Of GenerateResponses and ResumeResponses alike."""
    return [response.chunk for response in responses]


def _id(responses: Sequence[Any]) -> str:
    (generation_id,) = {response.chunk.generation_id for response in responses}
    return str(generation_id)


def _resume(server: Bench, responses: Sequence[Any], offset: int | None = None, **options: Any) -> Any:
    offset = len(ids_of(responses)) if offset is None else offset
    return server.stub.Resume(pb.ResumeRequest(generation_id=_id(responses), next_offset=offset), **options)


async def test_every_chunk_names_its_generation(counting: Bench) -> None:
    responses = await drained(counting.stub.Generate(tokens_request(n=2)))
    names = {response.chunk.index: response.chunk.generation_id for response in responses}
    assert all(response.chunk.generation_id == names[response.chunk.index] for response in responses)
    assert len(set(names.values())) == 2
    assert all(len(name) == 32 and set(name) <= set("0123456789abcdef") for name in names.values())
    assert not any(response.chunk.HasField("origin") for response in responses)


async def test_a_call_that_broke_off_is_resumed_without_a_gap(slow: Bench) -> None:
    before = await _left(slow, _resumable(), 5)
    after = await drained(_resume(slow, before))
    assert ids_of([*before, *after]) == list(range(21, 81))
    assert _id([*before, *after])
    assert finish_of([*before, *after]).usage.generated_tokens == 60
    assert [response.chunk.HasField("origin") for response in (*before, *after)] == [True] + [False] * (
        len(before) + len(after) - 1
    )


async def test_one_that_has_ended_is_replayed_from_any_message_on(slow: Bench) -> None:
    whole = await drained(slow.stub.Generate(_resumable(max_tokens=12)))
    for index, response in enumerate(whole):
        assert _chunks(await drained(_resume(slow, whole, response.chunk.offset))) == _chunks(whole[index:])
    assert await drained(_resume(slow, whole, 12)) == []


async def test_the_newer_call_takes_over(slow: Bench) -> None:
    older = slow.stub.Generate(_resumable(max_tokens=200))
    before = await _some(older, 3)
    newer = _resume(slow, before, 0)
    assert ids_of(await _some(newer, 3)) == ids_of(before)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _rest(older)
    failed = failure_of(caught.value)
    assert (failed.code, failed.reason) == (grpc.StatusCode.ABORTED, "SUPERSEDED")
    rest = await _rest(newer)
    assert ids_of([*before, *rest]) == list(range(21, 221))


async def test_cancel_ends_it_at_once(slow: Bench) -> None:
    call = slow.stub.Generate(_resumable(max_tokens=400))
    before = await _some(call, 3)
    await slow.stub.Cancel(pb.CancelRequest(generation_id=_id(before)))
    rest = await _rest(call)
    assert finish_of(rest).reason == pb.FINISH_REASON_CANCELLED
    assert len(ids_of([*before, *rest])) < 200
    failed = await failure(slow.stub.Cancel(pb.CancelRequest(generation_id=_id(before))))
    assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "GENERATION_UNKNOWN")


async def test_what_was_left_can_be_cancelled(slow: Bench) -> None:
    before = await _left(slow, _resumable(max_tokens=400), 3)
    await slow.stub.Cancel(pb.CancelRequest(generation_id=_id(before)))
    stats = await slow.idle_stats()
    assert stats.num_free_blocks == stats.num_total_blocks


async def test_refusals(slow: Bench) -> None:
    """Unknown, ahead, inside a message, another tenant's."""
    whole = await drained(slow.stub.Generate(_resumable(max_tokens=8), metadata=((TENANT, "a"),)))
    mine, other = {"metadata": ((TENANT, "a"),)}, {"metadata": ((TENANT, "b"),)}
    assert _chunks(await drained(_resume(slow, whole, 0, **mine))) == _chunks(whole)
    unknown = (grpc.StatusCode.NOT_FOUND, "GENERATION_UNKNOWN")
    nobodys = slow.stub.Resume(pb.ResumeRequest(generation_id="0" * 32), **mine)
    theirs = _resume(slow, whole, 0, **other)
    failures = [await failure(drained(call)) for call in (nobodys, theirs)]
    assert [(failed.code, failed.reason) for failed in failures] == [unknown] * 2
    assert failures[0].message == failures[1].message  # no oracle: whether the id is in use cannot be told
    failed = await failure(slow.stub.Cancel(pb.CancelRequest(generation_id=_id(whole)), **other))
    assert (failed.code, failed.reason) == unknown
    failed = await failure(drained(_resume(slow, whole, 9, **mine)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "OFFSET_AHEAD")
    failed = await failure(drained(slow.stub.Resume(pb.ResumeRequest())))
    assert (failed.reason, failed.fields) == ("INVALID_REQUEST", ("generation_id",))


async def test_without_a_reader_it_goes_on_for_the_grace_only(tiny_llama_gguf: Path) -> None:
    command = scripted_engine.command(step_seconds=0.005)
    async with bench(tiny_llama_gguf, command, resume_grace=0.05) as server:
        before = await _left(server, _resumable(max_tokens=500), 3)
        stats = await server.idle_stats()
        assert stats.num_steps < 250
        failed = await failure(drained(_resume(server, before)))
        assert failed.reason == "GENERATION_UNKNOWN"


async def test_messages_are_kept_for_the_retention_and_within_the_bytes(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), resume_retention=0.05) as server:
        whole = await drained(server.stub.Generate(_resumable(max_tokens=5)))

        async def is_gone() -> bool:
            try:
                return not await drained(_resume(server, whole, 0))
            except grpc.aio.AioRpcError as error:
                return failure_of(error).reason == "GENERATION_UNKNOWN"

        await until(is_gone)
    async with bench(tiny_llama_gguf, scripted_engine.command(), resume_bytes=60_000) as server:
        runs = [await drained(server.stub.Generate(_resumable(max_tokens=100, logprobs=20))) for _ in range(4)]
        assert _chunks(await drained(_resume(server, runs[-1], 0))) == _chunks(runs[-1])
        assert (await failure(drained(_resume(server, runs[0], 0)))).reason == "GENERATION_UNKNOWN"


async def test_one_too_large_to_keep_is_streamed_all_the_same(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), resume_bytes=3000) as server:
        whole = await drained(server.stub.Generate(_resumable(max_tokens=150)))
        assert ids_of(whole) == list(range(21, 171))
        assert finish_of(whole)


async def test_a_drain_does_not_wait_for_what_nobody_reads(tiny_llama_gguf: Path) -> None:
    command = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, command, drain_deadline=15.0) as server:
        await _left(server, _resumable(max_tokens=500), 2)
        call = server.stub.Generate(_resumable(max_tokens=30))
        before = await _some(call, 1)
        draining = asyncio.ensure_future(server.running.drain())
        assert ids_of([*before, *await _rest(call)]) == list(range(21, 51))
        await asyncio.wait_for(draining, 5)


async def test_after_the_engine_died_the_same_server_goes_on(tiny_llama_gguf: Path) -> None:
    command = scripted_engine.command(step_seconds=0.005)
    async with bench(tiny_llama_gguf, command) as server:
        request = _resumable(max_tokens=60)
        call = server.stub.Generate(request)
        before = await _some(call, 5)
        pid = server.running.host.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _rest(call)
        assert failure_of(caught.value).reason == "ENGINE_RESTARTED"
        assert (await failure(drained(_resume(server, before)))).reason == "GENERATION_UNKNOWN"
        await until(lambda: server.running.host.state == "ready")
        after = await drained(server.stub.Generate(_continued(request, before)))
        assert ids_of([*before, *after]) == list(range(21, 81))


def _continued(request: pb.GenerateRequest, responses: Sequence[Any]) -> pb.GenerateRequest:
    """The request that goes on after these messages of it."""
    again = pb.GenerateRequest()
    again.CopyFrom(request)
    origin = responses[0].chunk.origin
    again.continuation.CopyFrom(
        pb.Continuation(
            token_ids=ids_of(responses),
            prompt_hash=origin.prompt_hash,
            model_digest=origin.model_digest,
            arithmetic=origin.arithmetic,
        )
    )
    return again


_CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"top_k": 40, "top_p": 0.9},
    "logprobs": {"logprobs": 3},
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.7, "frequency_penalty": 0.4, "temperature": 0.7},
    "min tokens": {"min_tokens": 12, "stop_token_ids": list(range(100, 164)), "temperature": 2.0},
    "max tokens by default": {"max_tokens": 0, "stop_token_ids": [5, 6, 7], "temperature": 3.0},
}


@pytest.mark.parametrize("case", _CASES)
async def test_a_continuation_says_what_the_original_would_have(tiny: Bench, case: str) -> None:
    """Broken off after every message, tokens, text, log-probabilities and the end are the same."""
    request = _resumable([30, 31, 32], **{"temperature": 1.0, "max_tokens": 24, "seed": 11, **_CASES[case]})
    whole = await drained(tiny.stub.Generate(request))
    for count in range(1, len(whole), 3):
        rest = await drained(tiny.stub.Generate(_continued(request, whole[:count])))
        _check_same(whole, [*whole[:count], *rest])


def _check_same(whole: Sequence[Any], joined: Sequence[Any]) -> None:
    assert ids_of(joined) == ids_of(whole)
    assert text_of(joined) == text_of(whole)
    assert [entry for r in joined for entry in r.chunk.logprobs] == [entry for r in whole for entry in r.chunk.logprobs]
    one, other = finish_of(whole), finish_of(joined)
    assert (one.reason, one.stop_string, one.stop_token_id) == (other.reason, other.stop_string, other.stop_token_id)
    assert one.usage.generated_tokens == other.usage.generated_tokens
    assert one.usage.prompt_tokens == other.usage.prompt_tokens
    assert one.receipt == other.receipt


async def test_a_stop_string_across_the_break_matches(tiny: Bench) -> None:
    request = _resumable([30, 31, 32], temperature=1.0, max_tokens=40, seed=3)
    text = text_of(await drained(tiny.stub.Generate(request)))
    assert len(text) > 20
    for start in (3, 9, 14):
        request.sampling.ClearField("stop")
        request.sampling.stop.append(text[start : start + 5])
        whole = await drained(tiny.stub.Generate(request))
        assert finish_of(whole).stop_string == text[start : start + 5]
        for count in range(1, len(whole)):
            rest = await drained(tiny.stub.Generate(_continued(request, whole[:count])))
            _check_same(whole, [*whole[:count], *rest])


async def test_tokens_held_behind_a_stop_string_are_refused(tiny: Bench) -> None:
    request = _resumable([30, 31, 32], temperature=1.0, max_tokens=40, seed=3)
    whole = await drained(tiny.stub.Generate(request))
    request.sampling.stop.append(text_of(whole)[4:9])
    again = _continued(request, whole)
    del again.continuation.token_ids[-4:]
    failed = await failure(drained(tiny.stub.Generate(again)))
    assert (failed.reason, failed.fields) == ("INVALID_REQUEST", ("continuation.token_ids",))


async def test_who_holds_all_of_it_gets_the_end_alone(counting: Bench) -> None:
    for sampling, reason in (
        ({"max_tokens": 6}, pb.FINISH_REASON_LENGTH),
        ({"max_tokens": 30, "stop_token_ids": [26]}, pb.FINISH_REASON_STOP),
    ):
        request = _resumable(**sampling)
        whole = await drained(counting.stub.Generate(request))
        (last,) = await drained(counting.stub.Generate(_continued(request, whole)))
        assert (last.chunk.offset, list(last.chunk.token_ids), last.chunk.finish.reason) == (6, [], reason)
        assert last.chunk.finish.receipt == finish_of(whole).receipt
        again = _continued(request, whole)
        again.continuation.token_ids.append(40)
        failed = await failure(drained(counting.stub.Generate(again)))
        assert (failed.reason, failed.fields) == ("INVALID_REQUEST", ("continuation.token_ids",))


async def test_what_does_not_match_is_not_continued(counting: Bench) -> None:
    request = _resumable(max_tokens=10)
    before = await _left(counting, request, 2)
    for field, value, reason in (
        ("prompt_hash", DIGEST, "PROMPT_DIFFERS"),
        ("model_digest", DIGEST, "MODEL_DIFFERS"),
        ("arithmetic", "abacus", "ARITHMETIC_DIFFERS"),
    ):
        again = _continued(request, before)
        setattr(again.continuation, field, value)
        failed = await failure(drained(counting.stub.Generate(again)))
        assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, reason)
    again = _continued(request, before)
    again.prompt.tokens.ids.append(5)
    assert (await failure(drained(counting.stub.Generate(again)))).reason == "PROMPT_DIFFERS"


async def test_invalid_continuations_are_named(counting: Bench) -> None:
    request = _resumable(n=2)
    request.sampling.ClearField("seed")
    request.continuation.token_ids.append(scripted_engine.VOCAB_SIZE)
    request.continuation.prompt_hash = "A" * 64
    failed = await failure(drained(counting.stub.Generate(request)))
    assert set(failed.fields) == {
        "sampling.n",
        "sampling.seed",
        "continuation.token_ids[0]",
        "continuation.prompt_hash",
        "continuation.model_digest",
    }
    failed = await failure(counting.stub.Complete(pb.CompleteRequest(request=_resumable())))
    assert failed.fields == ("request.resumable",)
    request = _resumable()
    request.continuation.CopyFrom(pb.Continuation(token_ids=[5] * 600, prompt_hash=DIGEST, model_digest=DIGEST))
    request.continuation.arithmetic = "x" * 257
    failed = await failure(drained(counting.stub.Generate(request)))
    assert failed.fields == ("continuation.token_ids", "continuation.arithmetic")
    for method in (counting.stub.Resume, counting.stub.Cancel):
        request_class = pb.ResumeRequest if method is counting.stub.Resume else pb.CancelRequest
        call = method(request_class(generation_id="x" * 129))
        failed = await failure(drained(call) if method is counting.stub.Resume else call)
        assert failed.fields == ("generation_id",)


async def test_the_receipt_says_what_was_generated(counting: Bench) -> None:
    responses = await drained(counting.stub.Generate(tokens_request([20], max_tokens=4, seed=9, top_k=5, n=2)))
    for index in range(2):
        receipt = finish_of(responses, index).receipt
        ids = ids_of(responses, index)
        assert receipt.token_hash == hashlib.sha256(struct.pack("<4I", *ids)).hexdigest()
        assert receipt.origin.prompt_hash == hashlib.sha256(struct.pack("<I", 20)).hexdigest()
        assert (receipt.sampling.seed, receipt.sampling.n, receipt.sampling.top_k) == (receipt.origin.seed, 1, 5)
        assert receipt.origin.seed == finish_of(responses, index).seed
        assert receipt.generated_tokens == 4
        assert receipt.model == "tiny"
        path = Path(counting.running.config.model)
        assert receipt.origin.model_digest == hashlib.sha256(path.read_bytes()).hexdigest()
