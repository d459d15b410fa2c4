"""Session: many generations on one stream, conversations whose tokens stay cached, commands that fail as events."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.support import Bench, bench, chat_prompt, drained, failure, ids_of, tokens_request, until
from tests.server.talk import Talk, chunks, finish

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_generations_are_multiplexed_and_say_when_they_start(counting: Bench) -> None:
    talk = Talk(counting.stub)
    for index in range(10):
        await talk.start(f"g{index}", tokens_request([20 + index], max_tokens=30))
    events = await talk.until_ended(*(f"g{index}" for index in range(10)))
    for index in range(10):
        first, *_, last = events[f"g{index}"]
        assert first.started.prompt_tokens == 1
        assert ids_of(chunks(events[f"g{index}"])) == list(range(21 + index, 51 + index))
        assert last.chunk.chunk.finish.reason == pb.FINISH_REASON_LENGTH
    await talk.end()


async def test_half_close_lets_what_runsfinish(counting: Bench) -> None:
    talk = Talk(counting.stub)
    await talk.start("a", tokens_request(max_tokens=300))
    await talk.call.done_writing()
    events = await talk.until_ended("a")
    assert len(ids_of(chunks(events["a"]))) == 300
    assert await talk.call.read() is grpc.aio.EOF


async def test_cancelling_the_stream_stops_everything_in_the_engine(tiny_llama_gguf: Any) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02)) as server:
        talk = Talk(server.stub)
        for index in range(5):
            await talk.start(f"g{index}", tokens_request([20 + index] * 40, max_tokens=400))
        await until(lambda: _is_running(server, 5))
        talk.call.cancel()
        stats = await server.idle_stats()
        assert stats.num_free_blocks == stats.num_total_blocks
        assert stats.num_steps < 300


async def _is_running(server: Bench, count: int) -> bool:
    return (await server.stats()).num_running == count


async def test_a_cancelled_generation_ends_and_its_neighbour_goes_on(tiny_llama_gguf: Any) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005)) as server:
        talk = Talk(server.stub)
        await talk.start("stay", tokens_request([20], max_tokens=60))
        await talk.start("go", tokens_request([120], max_tokens=400))
        while (await talk.event()).chunk.generation_id != "go":
            pass
        await talk.send(cancel=pb.SessionCancel(generation_id="go"))
        events = await talk.until_ended("go", "stay")
        assert finish(events["go"]).reason == pb.FINISH_REASON_CANCELLED
        assert finish(events["go"]).usage.generated_tokens < 60
        assert finish(events["stay"]).usage.generated_tokens == 60
        await talk.send(cancel=pb.SessionCancel(generation_id="go"))
        assert (await talk.error()).reason == "GENERATION_NOT_FOUND"
        await talk.end()


async def test_max_tokens_can_be_changed_while_it_runs(tiny_llama_gguf: Any) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005)) as server:
        talk = Talk(server.stub)
        await talk.start("short", tokens_request([20], max_tokens=400))
        await talk.start("long", tokens_request([120], max_tokens=30))
        await talk.send(update=pb.SessionUpdate(generation_id="short", max_tokens=40))
        await talk.send(update=pb.SessionUpdate(generation_id="long", max_tokens=50))
        events = await talk.until_ended("short", "long")
        for name, count in (("short", 40), ("long", 50)):
            assert finish(events[name]).reason == pb.FINISH_REASON_LENGTH
            assert finish(events[name]).usage.generated_tokens == count
        await talk.end()


async def test_max_tokens_below_what_is_generated_ends_it_at_once(tiny_llama_gguf: Any) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005)) as server:
        talk = Talk(server.stub)
        await talk.start("a", tokens_request([20], max_tokens=400))
        seen = 0
        while seen < 10:
            seen += len((await talk.event()).chunk.chunk.token_ids)
        await talk.send(update=pb.SessionUpdate(generation_id="a", max_tokens=3))
        events = await talk.until_ended("a")
        assert finish(events["a"]).reason == pb.FINISH_REASON_LENGTH
        assert 10 <= finish(events["a"]).usage.generated_tokens < 100
        await talk.end()


async def test_ping_goes_through_the_engine(counting: Bench) -> None:
    talk = Talk(counting.stub)
    await talk.send(ping=pb.SessionPing(nonce=2**64 - 1))
    first = (await talk.event()).pong
    await talk.start("a", tokens_request(max_tokens=9))
    await talk.until_ended("a")
    await talk.send(ping=pb.SessionPing(nonce=5))
    second = (await talk.event()).pong
    assert (first.nonce, second.nonce) == (2**64 - 1, 5)
    assert second.engine_steps == first.engine_steps + 9
    await talk.end()


async def test_a_conversation_goes_on_from_the_very_tokens_the_engine_has_cached(tiny: Bench) -> None:
    """The second turn's prompt is the first turn's tokens, the answer's tokens and the template's delta, in this
    order."""
    talk = Talk(tiny.stub)
    request = pb.GenerateRequest(prompt=chat_prompt("Tell me about the wheel. " * 6))
    request.sampling.CopyFrom(pb.SamplingParams(max_tokens=20, seed=3, temperature=1.0))
    await talk.start("turn-1", request, "chat")
    first = (await talk.until_ended("turn-1"))["turn-1"]
    answer = ids_of(chunks(first))
    prompt = list((await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=request.prompt))).token_ids)
    assert first[0].started.prompt_tokens == len(prompt)

    await talk.append("turn-2", "chat", "And the mill?")
    second = (await talk.until_ended("turn-2"))["turn-2"]
    usage = finish(second).usage
    known = len(prompt) + len(answer)
    # All full blocks of what has been computed are found; the last token was sampled but never computed.
    assert usage.cached_prompt_tokens == (known - 1) // 16 * 16
    assert usage.prompt_tokens == second[0].started.prompt_tokens > known
    await talk.end()

    text = (await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=request.prompt))).rendered
    assert text.startswith("<|im_start|>user\nTell me")
    delta = "<|im_end|>\n<|im_start|>user\nAnd the mill?<|im_end|>\n<|im_start|>assistant\n"
    tail = await tiny.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="user\nAnd the mill?")))
    # Beside plain text the delta has 5 special tokens, 2 newlines after them and "assistant\n".
    assert delta.count("<|im") == 4
    assert usage.prompt_tokens - known > len(tail.token_ids)


async def test_an_answer_that_ended_by_itself_is_closed_once(counting: Bench) -> None:
    """The end token is part of the answer and of the template's text; the next prompt must hold it once."""
    talk = Talk(counting.stub)
    request = pb.GenerateRequest(prompt=chat_prompt("hi"), sampling=pb.SamplingParams(max_tokens=8, temperature=0))
    prompt = list((await counting.stub.Tokenize(pb.TokenizeRequest(prompt=request.prompt))).token_ids)
    # Counting from the prompt's last token: stop at the fourth one.
    last = prompt[-1]
    expected = []
    for _ in range(4):
        last = scripted_engine.following(last)
        expected.append(last)
    request.sampling.stop_token_ids.append(expected[3])
    await talk.start("a", request, "chat")
    events = (await talk.until_ended("a"))["a"]
    assert ids_of(chunks(events)) == expected
    spoken = "".join(event.chunk.chunk.text for event in events)
    await talk.append("b", "chat", "ho", max_tokens=1, temperature=0.0)
    second = (await talk.until_ended("b"))["b"]
    whole = chat_prompt("hi", spoken, "ho")
    retokenised = await counting.stub.Tokenize(pb.TokenizeRequest(prompt=whole))
    assert abs(second[0].started.prompt_tokens - len(retokenised.token_ids)) <= 3  # other cuts of the answer at most
    assert second[0].started.prompt_tokens == len(prompt) + 3 + len(
        (await counting.stub.Tokenize(pb.TokenizeRequest(prompt=chat_prompt("", "", "ho")))).token_ids
    ) - len((await counting.stub.Tokenize(pb.TokenizeRequest(prompt=chat_prompt("")))).token_ids)
    await talk.end()


async def test_a_failed_turn_can_be_asked_again(tiny_llama_gguf: Any) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), default_deadline=0.5, num_blocks=64) as server:
        talk = Talk(server.stub)
        request = pb.GenerateRequest(prompt=chat_prompt("hi"), sampling=pb.SamplingParams(max_tokens=4, temperature=0))
        await talk.start("a", request, "chat")
        first = (await talk.until_ended("a"))["a"]
        too_long = "x" * 3000
        await talk.append("b", "chat", too_long)
        error = await talk.error()
        assert (error.reason, error.field) == ("PROMPT_TOO_LONG", "append.prompt")
        await talk.append("c", "chat", "ho")
        second = (await talk.until_ended("c"))["c"]
        assert second[0].started.prompt_tokens < 2 * first[0].started.prompt_tokens + 20
        await talk.end()


async def test_failed_commands_are_events_and_the_stream_goes_on(counting: Bench) -> None:
    talk = Talk(counting.stub)
    first = pb.GenerateRequest(prompt=chat_prompt("hi"), sampling=pb.SamplingParams(max_tokens=1))
    await talk.start("busy", first, "c")
    await talk.until_ended("busy")

    async def refused(reason: str, field: str = "", **command: Any) -> None:
        await talk.send(**command)
        error = await talk.error()
        assert (error.reason, error.field) == (reason, field)
        assert error.code != 0
        assert error.message

    ok = tokens_request(max_tokens=1)
    chat = pb.GenerateRequest(prompt=chat_prompt("hi"))
    await refused("INVALID_REQUEST", "command")
    await refused("INVALID_REQUEST", "start.generation_id", start=pb.SessionStart(request=ok))
    long_id = pb.SessionStart(generation_id="é" * 65, request=ok)
    await refused("INVALID_REQUEST", "start.generation_id", start=long_id)
    await refused("INVALID_REQUEST", "start.request", start=pb.SessionStart(generation_id="a"))
    two = pb.SessionStart(generation_id="a", request=tokens_request(n=2))
    await refused("INVALID_REQUEST", "start.request.sampling.n", start=two)
    bad = pb.SessionStart(generation_id="a", request=tokens_request(top_p=1.5))
    await refused("INVALID_REQUEST", "start.request.sampling.top_p", start=bad)
    kept = pb.SessionStart(generation_id="a", conversation_id="d", request=ok)
    await refused("INVALID_REQUEST", "start.request.prompt", start=kept)
    again = pb.SessionStart(generation_id="a", conversation_id="c", request=chat)
    await refused("CONVERSATION_EXISTS", start=again)
    other = pb.SessionStart(generation_id="a", request=pb.GenerateRequest(model="other", prompt=ok.prompt))
    await refused("MODEL_NOT_FOUND", start=other)
    message = pb.ChatMessage(role=pb.ROLE_USER, content="ho")
    unknown = pb.SessionAppend(generation_id="a", conversation_id="no", messages=[message])
    await refused("CONVERSATION_NOT_FOUND", append=unknown)
    empty = pb.SessionAppend(generation_id="a", conversation_id="c")
    await refused("INVALID_REQUEST", "append.messages", append=empty)
    nobody = pb.SessionAppend(generation_id="a", conversation_id="c", messages=[pb.ChatMessage(content="ho")])
    await refused("INVALID_REQUEST", "append.messages[0].role", append=nobody)
    await refused("GENERATION_NOT_FOUND", cancel=pb.SessionCancel(generation_id="nothing"))
    await refused("INVALID_REQUEST", "cancel.generation_id", cancel=pb.SessionCancel())
    await refused("GENERATION_NOT_FOUND", update=pb.SessionUpdate(generation_id="nothing", max_tokens=5))
    await refused("INVALID_REQUEST", "update.max_tokens", update=pb.SessionUpdate(generation_id="nothing"))
    await talk.start("last", ok)
    assert finish((await talk.until_ended("last"))["last"]).reason == pb.FINISH_REASON_LENGTH
    await talk.end()


async def test_ids_in_use_are_refused_and_free_again_afterwards(tiny_llama_gguf: Any) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005)) as server:
        talk = Talk(server.stub)
        chat = pb.GenerateRequest(prompt=chat_prompt("hi"), sampling=pb.SamplingParams(max_tokens=100, ignore_eos=True))
        await talk.start("a", chat, "c")
        await talk.start("a", tokens_request())
        await talk.append("b", "c", "not yet")
        errors = []
        while len(errors) < 2:
            event = await talk.event()
            if event.HasField("error"):
                errors.append((event.error.generation_id, event.error.reason, event.error.is_final))
        assert errors == [("a", "GENERATION_EXISTS", False), ("b", "CONVERSATION_BUSY", True)]
        await talk.until_ended("a")
        await talk.start("a", tokens_request(max_tokens=2))
        await talk.until_ended("a")
        await talk.end()


async def test_a_session_holds_so_many_generations_and_conversations(tiny_llama_gguf: Any) -> None:
    settings = {"max_generations_per_session": 2, "max_conversations_per_session": 1}
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005), **settings) as server:
        talk = Talk(server.stub)
        for name in ("a", "b", "c"):
            await talk.start(name, tokens_request(max_tokens=60))
        events = await talk.until_ended("a", "b", "c")
        assert [event.WhichOneof("event") for event in events["c"]] == ["error"]
        assert events["c"][0].error.reason == "SESSION_FULL"
        chat = pb.GenerateRequest(prompt=chat_prompt("hi"), sampling=pb.SamplingParams(max_tokens=1))
        await talk.start("d", chat, "one")
        await talk.until_ended("d")
        await talk.start("e", chat, "two")
        assert (await talk.error()).reason == "SESSION_FULL"
        await talk.end()


async def test_malformed_bytes_end_the_session_with_its_status(counting: Bench) -> None:
    call = counting.channel.stream_stream("/headrace.v1.InferenceService/Session")()
    await call.write(b"\xff\xff\xff")
    failed = await failure(drained(call))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


async def test_a_client_that_sends_and_never_reads_is_not_listened_to_any_more(counting: Bench) -> None:
    """Its errors would pile up; the server stops reading instead, and gRPC's flow control stops the client."""
    call = counting.stub.Session()
    command = pb.SessionRequest(cancel=pb.SessionCancel(generation_id="x" * 20_000))  # comes back in the error
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while True:
            await call.write(command)
            sent += 1

    flooding = asyncio.ensure_future(flood())
    last = -1
    while sent != last:  # until a third of a second brings nothing new
        last = sent
        await asyncio.sleep(0.3)
    flooding.cancel()
    assert 64 < sent < 5_000  # windows and buffers of some MB
    call.cancel()
