"""A session's hand on what runs: interrupt, pause, resume, credit, other stop conditions.

Credit makes these tests exact: a generation with credit for 20 tokens sends 20 and stands still.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.support import Bench, bench, chat_prompt, drained, ids_of, tokens_request
from tests.server.talk import Talk, finish, ids, text

pytestmark = pytest.mark.asyncio(loop_scope="session")

A = 35  # token ids of "A", "B", ... in the tiny vocabulary
QUESTION = "Tell me about the wheel. " * 6


def _chat(content: str = "hi", **sampling: Any) -> pb.GenerateRequest:
    params = pb.SamplingParams(**{"max_tokens": 60, "seed": 3, "ignore_eos": True, **sampling})
    return pb.GenerateRequest(prompt=chat_prompt(content), sampling=params)


async def _tokens(server: Bench, *contents: str) -> list[int]:
    return list((await server.stub.Tokenize(pb.TokenizeRequest(prompt=chat_prompt(*contents)))).token_ids)


async def _delta(server: Bench, content: str) -> list[int]:
    """The tokens that a turn of the user adds behind an answer."""
    return (await _tokens(server, "", "", content))[len(await _tokens(server, "")) :]


# ---- interrupt ----


@pytest.mark.parametrize(("heard", "kept"), [(None, 20), (20, 20), (7, 7), (1, 1), (0, 0)])
async def test_the_next_turn_goes_on_from_exactly_what_was_heard(tiny: Bench, heard: int | None, kept: int) -> None:
    """Wherever the cut falls (the tiny model's answers are bytes of characters that it does not end): the answer and
    the tokens found in the cache are those of one prompt made of the tokens we held and the template's delta."""
    talk = Talk(tiny.stub)
    await talk.start("a", _chat(QUESTION), "chat", credit=20)
    await talk.until_sent("a", 20)
    await talk.send(interrupt=pb.SessionInterrupt(generation_id="a", heard_tokens=heard))
    events = (await talk.until_ended("a"))["a"]
    end = finish(events)
    assert (end.reason, end.usage.generated_tokens) == (pb.FINISH_REASON_INTERRUPTED, 20)
    assert (end.stop_string, end.HasField("stop_token_id")) == ("", False)

    await talk.append("b", "chat", "And the mill?", max_tokens=12, seed=4, ignore_eos=True)
    await talk.until_ended("b")
    known = await _tokens(tiny, QUESTION) + ids(talk.heard["a"])[:kept]
    prompt = known + await _delta(tiny, "And the mill?")
    assert finish(talk.heard["b"]).usage.prompt_tokens == len(prompt)
    assert finish(talk.heard["b"]).usage.cached_prompt_tokens >= len(known[:-1]) // 16 * 16
    request = tokens_request(prompt, max_tokens=12, seed=4, temperature=1.0, ignore_eos=True)
    assert ids(talk.heard["b"]) == ids_of(await drained(tiny.stub.Generate(request)))
    # And on from there.
    await talk.append("c", "chat", "Why?", max_tokens=5, seed=5)
    await talk.until_ended("c")
    third = prompt + ids(talk.heard["b"]) + await _delta(tiny, "Why?")
    assert finish(talk.heard["c"]).usage.prompt_tokens == len(third)
    await talk.end()


async def test_an_interrupt_ends_a_generation_within_a_step_and_drops_what_was_not_sent(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005)) as server:
        talk = Talk(server.stub)
        await talk.start("stay", tokens_request([20], max_tokens=200))
        await talk.start("go", tokens_request([20], max_tokens=400))
        await talk.until_sent("go", 10)
        steps = (await server.stats()).num_steps
        await talk.send(interrupt=pb.SessionInterrupt(generation_id="go"))
        await talk.until_ended("go")
        assert finish(talk.heard["go"]).reason == pb.FINISH_REASON_INTERRUPTED
        assert finish(talk.heard["go"]).usage.generated_tokens == len(ids(talk.heard["go"]))
        assert (await server.stats()).num_steps - steps < 100
        await talk.until_ended("stay")
        assert ids(talk.heard["stay"]) == list(range(21, 221))
        await talk.end()


async def test_an_answer_can_be_interrupted_before_it_began(counting: Bench) -> None:
    talk = Talk(counting.stub)
    await talk.start("a", _chat(), "chat", credit=0)
    await talk.send(interrupt=pb.SessionInterrupt(generation_id="a"))
    assert finish((await talk.until_ended("a"))["a"]).usage.generated_tokens == 0
    await talk.append("b", "chat", "ho", max_tokens=1)
    await talk.until_ended("b")
    assert finish(talk.heard["b"]).usage.prompt_tokens == len(await _tokens(counting, "hi", "", "ho"))
    await talk.end()


# ---- KV between two turns ----


async def test_a_conversation_is_pinned_until_its_session_ends(tiny_llama_gguf: Path) -> None:
    """32 blocks of 16: 8 other prompts of 4 blocks each would evict what is not pinned."""
    hits = {}
    for lease in (60.0, 0.0):
        async with bench(tiny_llama_gguf, num_blocks=33, conversation_lease=lease) as server:
            talk = Talk(server.stub)
            await talk.start("a", _chat(QUESTION, max_tokens=8), "chat")
            await talk.until_ended("a")
            for number in range(8):
                others = [(number * 31 + i * 7) % 250 + 3 for i in range(65)]
                await drained(server.stub.Generate(tokens_request(others, max_tokens=1)))
            pinned = (await server.stats()).num_pinned_blocks
            await talk.append("b", "chat", "And?", max_tokens=1)
            await talk.until_ended("b")
            known = len(await _tokens(server, QUESTION)) + 8
            hits[lease] = finish(talk.heard["b"]).usage.cached_prompt_tokens
            assert pinned == (known - 1) // 16 if lease else pinned == 0
            await talk.end()
            stats = await server.idle_stats()
            assert (stats.num_pinned_blocks, stats.num_pins_lost) == (0, 0)
    assert hits == {60.0: (known - 1) // 16 * 16, 0.0: 0}


async def test_under_pressure_the_pin_goes_and_the_answer_is_the_same(tiny_llama_gguf: Path) -> None:
    answers = []
    for has_pressure in (False, True):
        async with bench(tiny_llama_gguf, num_blocks=33) as server:
            talk = Talk(server.stub)
            await talk.start("a", _chat(QUESTION, max_tokens=8), "chat")
            await talk.until_ended("a")
            if has_pressure:
                whole = [i % 250 + 3 for i in range(490)]
                await drained(server.stub.Generate(tokens_request(whole, max_tokens=20)))
                assert (await server.stats()).num_pins_lost == 1
            await talk.append("b", "chat", "And?", max_tokens=20, seed=6)
            await talk.until_ended("b")
            usage = finish(talk.heard["b"]).usage
            assert (usage.cached_prompt_tokens == 0) == has_pressure
            answers.append((ids(talk.heard["a"]), ids(talk.heard["b"]), usage.prompt_tokens))
            await talk.end()
    assert answers[0] == answers[1]


# ---- pause and resume ----


async def test_a_paused_generation_stands_still_and_goes_on_token_for_token(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.005), max_num_seqs=1) as server:
        talk = Talk(server.stub)
        await talk.start("a", tokens_request([20], max_tokens=120))
        await talk.until_sent("a", 5)
        for _ in range(2):
            await talk.send(pause=pb.SessionPause(generation_id="a"))
        await talk.ping()
        await talk.start("b", tokens_request([60], max_tokens=40))  # there is one place in the batch
        await talk.until_ended("b")
        sent = len(ids(talk.heard["a"]))
        assert sent < 100
        stats = await server.stats()
        assert (stats.num_parked, stats.num_running, stats.num_waiting) == (1, 0, 0)
        for _ in range(2):
            await talk.send(resume=pb.SessionResume(generation_id="a"))
        await talk.until_ended("a")
        assert ids(talk.heard["a"]) == list(range(21, 141))
        assert ids(talk.heard["b"]) == list(range(61, 101))
        await talk.end()


async def test_others_may_take_the_blocks_of_a_paused_generation(tiny: Bench) -> None:
    """The pool holds 2,048 tokens; 5 prompts of 480 do not fit beside it."""
    request = _chat(QUESTION, max_tokens=30)
    talk = Talk(tiny.stub)
    await talk.start("alone", request)
    await talk.until_ended("alone")
    await talk.start("a", request, credit=10)
    await talk.until_sent("a", 10)
    await talk.send(pause=pb.SessionPause(generation_id="a"))
    await talk.send(credit=pb.SessionCredit(generation_id="a", tokens=1000))
    before = (await tiny.stats()).num_preemptions
    big = [tokens_request([(n * 37 + i * 11) % 250 + 3 for i in range(480)], max_tokens=20) for n in range(5)]
    await asyncio.gather(*(drained(tiny.stub.Generate(each)) for each in big))
    assert (await tiny.stats()).num_preemptions > before
    await talk.send(resume=pb.SessionResume(generation_id="a"))
    await talk.until_ended("a")
    assert ids(talk.heard["a"]) == ids(talk.heard["alone"])
    await talk.end()


async def test_a_deadline_holds_while_paused_or_without_credit(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(), default_deadline=0.5) as server:
        talk = Talk(server.stub)
        await talk.start("paused", tokens_request(max_tokens=100), credit=3)
        await talk.start("poor", tokens_request(max_tokens=100), credit=3)
        await talk.until_sent("poor", 3)
        await talk.send(pause=pb.SessionPause(generation_id="paused"))
        events = await talk.until_ended("paused", "poor")
        assert [events[name][-1].error.reason for name in ("paused", "poor")] == ["TIME_LIMIT"] * 2
        await talk.end()


# ---- credit ----


async def test_who_grants_nothing_parks_its_own_sequence_only(counting: Bench) -> None:
    talk = Talk(counting.stub)
    names = [f"g{index}" for index in range(15)]
    await talk.start("slow", tokens_request([20], max_tokens=100), credit=5)
    for name in names:
        await talk.start(name, tokens_request([20], max_tokens=100))
    await talk.until_ended(*names)
    assert [ids(talk.heard[name]) for name in names] == [list(range(21, 121))] * 15
    await talk.ping()
    assert ids(talk.heard["slow"]) == list(range(21, 26))
    stats = await counting.stats()
    assert (stats.num_parked, stats.num_running) == (1, 0)
    await talk.send(credit=pb.SessionCredit(generation_id="slow", tokens=2))
    await talk.send(credit=pb.SessionCredit(generation_id="slow", tokens=7))
    await talk.until_sent("slow", 14)
    await talk.ping()
    assert len(ids(talk.heard["slow"])) == 14
    await talk.send(credit=pb.SessionCredit(generation_id="slow", tokens=0xFFFFFFFF - 14))
    await talk.until_ended("slow")
    assert ids(talk.heard["slow"]) == list(range(21, 121))
    assert finish(talk.heard["slow"]).reason == pb.FINISH_REASON_LENGTH
    await talk.end()


async def test_an_appended_turn_can_have_credit_too(counting: Bench) -> None:
    talk = Talk(counting.stub)
    await talk.start("a", _chat(max_tokens=2), "chat")
    await talk.until_ended("a")
    message = pb.ChatMessage(role=pb.ROLE_USER, content="ho")
    append = pb.SessionAppend(generation_id="b", conversation_id="chat", messages=[message], credit_tokens=1)
    await talk.send(append=append)
    await talk.until_sent("b", 1)
    await talk.ping()
    assert len(ids(talk.heard["b"])) == 1
    await talk.send(cancel=pb.SessionCancel(generation_id="b"))
    await talk.until_ended("b")
    await talk.end()


# ---- stop conditions ----


async def _changed(server: Bench, request: pb.GenerateRequest, credit: int, *updates: pb.StopConditions) -> Talk:
    """A generation whose stop conditions change when it has sent `credit` tokens, and which may then go on."""
    talk = Talk(server.stub)
    await talk.start("a", request, credit=credit)
    await talk.until_sent("a", credit)
    for update in updates:
        await talk.send(update=pb.SessionUpdate(generation_id="a", stop_conditions=update))
    await talk.ping()
    await talk.send(credit=pb.SessionCredit(generation_id="a", tokens=100))  # refused where it has ended by now
    await talk.call.done_writing()
    while await talk.event_or_end() is not None:
        pass
    return talk


@pytest.mark.parametrize(
    ("before", "after", "sent", "stop", "count"),
    [
        ([], ["GH"], "ABCDEF", "GH", 8),
        (["GH"], [], "ABCDEFGHIJ", "", 10),
        (["DEZ"], ["E"], "ABCD", "E", 5),  # what was held back for one holds another
        (["DEZ"], ["CD"], "ABCDEFGHIJ", "", 10),  # "C" had been sent
        (["DEZ"], ["EFG"], "ABCD", "EFG", 7),  # it began in what was held back
        (["DEZ"], ["DEF", "H"], "ABC", "DEF", 6),
    ],
)
async def test_stop_strings_change_from_the_text_on_that_was_not_sent(
    counting: Bench, before: list[str], after: list[str], sent: str, stop: str, count: int
) -> None:
    request = tokens_request([A - 1], max_tokens=10, stop=before)
    talk = await _changed(counting, request, 5, pb.StopConditions(stop=after))
    end = finish(talk.heard["a"])
    assert (text(talk.heard["a"]), end.stop_string, end.usage.generated_tokens) == (sent, stop, count)
    assert end.reason == (pb.FINISH_REASON_STOP if stop else pb.FINISH_REASON_LENGTH)


async def test_text_that_nothing_holds_back_any_more_is_sent_at_once(counting: Bench) -> None:
    talk = Talk(counting.stub)
    await talk.start("a", tokens_request([A - 1], max_tokens=10, stop=["DEZ"]), credit=5)
    await talk.until_sent("a", 5)
    assert text(talk.heard["a"]) == "ABC"
    await talk.send(update=pb.SessionUpdate(generation_id="a", stop_conditions=pb.StopConditions()))
    while text(talk.heard["a"]) != "ABCDE":
        await talk.event()
    await talk.send(interrupt=pb.SessionInterrupt(generation_id="a"))
    await talk.until_ended("a")
    await talk.end()


async def test_stop_tokens_and_end_tokens_change(counting: Bench) -> None:
    request = tokens_request([A - 1], max_tokens=10, stop_token_ids=[A + 6])
    talk = await _changed(counting, request, 3, pb.StopConditions(stop_token_ids=[A + 4]))
    assert finish(talk.heard["a"]).stop_token_id == A + 4
    assert ids(talk.heard["a"]) == list(range(A, A + 5))

    request = tokens_request([scripted_engine.STOP], max_tokens=3)  # the end token comes next
    talk = await _changed(counting, request, 0, pb.StopConditions(ignore_eos=True))
    assert ids(talk.heard["a"])[0] == scripted_engine.EOS
    assert finish(talk.heard["a"]).reason == pb.FINISH_REASON_LENGTH
    talk = await _changed(counting, request, 0, pb.StopConditions(ignore_eos=True), pb.StopConditions())
    assert finish(talk.heard["a"]).stop_token_id == scripted_engine.EOS


# ---- refusals ----


async def test_commands_that_make_no_sense_are_refused_and_change_nothing(counting: Bench) -> None:
    talk = Talk(counting.stub)
    await talk.start("open", tokens_request([20], max_tokens=300))
    await talk.until_ended("open")
    await talk.start("a", tokens_request([20], max_tokens=20), credit=3)
    await talk.start("free", tokens_request([20], max_tokens=20))
    await talk.send(pause=pb.SessionPause(generation_id="free"))
    await talk.until_sent("a", 3)

    async def refused(reason: str, code: grpc.StatusCode, field: str = "", **command: Any) -> None:
        await talk.send(**command)
        while True:
            event = await talk.event()
            if event.HasField("error"):
                break
        error = event.error
        assert (error.reason, error.code, error.field) == (reason, code.value[0], field)

    unknown, invalid = grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT
    for name in ("open", "never"):
        await refused("GENERATION_NOT_FOUND", unknown, interrupt=pb.SessionInterrupt(generation_id=name))
        await refused("GENERATION_NOT_FOUND", unknown, pause=pb.SessionPause(generation_id=name))
        await refused("GENERATION_NOT_FOUND", unknown, resume=pb.SessionResume(generation_id=name))
        await refused("GENERATION_NOT_FOUND", unknown, credit=pb.SessionCredit(generation_id=name, tokens=1))
    bad = "INVALID_REQUEST"
    await refused(bad, invalid, "interrupt.generation_id", interrupt=pb.SessionInterrupt())
    await refused(bad, invalid, "pause.generation_id", pause=pb.SessionPause())
    await refused(bad, invalid, "resume.generation_id", resume=pb.SessionResume(generation_id="x" * 129))
    await refused(bad, invalid, "credit.generation_id", credit=pb.SessionCredit(tokens=1))
    heard = pb.SessionInterrupt(generation_id="a", heard_tokens=4)
    await refused(bad, invalid, "interrupt.heard_tokens", interrupt=heard)
    await refused(bad, invalid, "credit.tokens", credit=pb.SessionCredit(generation_id="a"))
    overflow = pb.SessionCredit(generation_id="a", tokens=0xFFFFFFFF - 2)  # 3 were granted
    await refused(bad, invalid, "credit.tokens", credit=overflow)
    more = pb.SessionCredit(generation_id="free", tokens=1)
    await refused("CREDIT_UNLIMITED", grpc.StatusCode.FAILED_PRECONDITION, credit=more)

    def update(**changes: Any) -> pb.SessionUpdate:
        return pb.SessionUpdate(generation_id="a", **changes)

    await refused(bad, invalid, "update.max_tokens", update=update())
    await refused(bad, invalid, "update.max_tokens", update=update(max_tokens=0))
    await refused(bad, invalid, "update.max_tokens", update=update(max_tokens=512))
    for field, conditions in (
        ("stop", pb.StopConditions(stop=["x"] * 17)),
        ("stop[0]", pb.StopConditions(stop=[""])),
        ("stop[1]", pb.StopConditions(stop=["x", "é" * 129])),
        ("stop_token_ids", pb.StopConditions(stop_token_ids=[3] * 65)),
        ("stop_token_ids[1]", pb.StopConditions(stop_token_ids=[3, 100_000])),
    ):
        await refused(bad, invalid, f"update.stop_conditions.{field}", update=update(stop_conditions=conditions))
    await talk.send(credit=pb.SessionCredit(generation_id="a", tokens=100))
    await talk.send(resume=pb.SessionResume(generation_id="free"))
    waiting = {name for name in ("a", "free") if not finish(talk.heard[name]).reason}
    await talk.until_ended(*waiting)
    assert ids(talk.heard["a"]) == ids(talk.heard["free"]) == list(range(21, 41))
    await talk.end()
