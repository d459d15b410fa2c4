"""Sessions through Envoy: a conversation that is interrupted and goes on, credit, KV that stays between two turns."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from headrace.client import AsyncClient, AsyncSession, AsyncSessionGeneration, Chunk, Message

from tests.mesh.claims import Stage, Verdict, claim
from tests.mesh.fleet import PATIENCE

GRPCURL = Path(sys.executable).with_name("grpcurl")
PROTOS = Path(__file__).parents[3] / "protos"
QUESTION = "Explain in some detail how the wheel of an old water mill is driven, and what the headrace is for."


@claim("an answer interrupted mid-token ends at once, and the next turn goes on from exactly what was heard, KV reused")
async def barge_in(stage: Stage) -> Verdict:
    """The second answer must be that of one prompt made of the tokens that the client held and the template's delta."""
    rounds = 3 if stage.is_quick else 10
    same, milliseconds, late, cached = 0, [], 0, []
    num_replicas = 1 if stage.is_quick else 2
    async with stage.fleet(num_replicas, model=stage.smollm2) as fleet, AsyncClient(fleet.target) as client:
        delta = await _delta(client, "And in winter?")
        for number in range(rounds):
            question, heard = [Message("user", f"{number}. {QUESTION}")], 5 + 7 * number
            async with client.session() as session:
                first = session.start(messages=question, conversation="c", seed=number, max_tokens=400)
                held = await _take(first, heard + 2)
                began = time.perf_counter()
                first.interrupt(heard)
                rest = [chunk async for chunk in first]
                milliseconds.append(round(1000 * (time.perf_counter() - began), 1))
                late += len(_ids(rest))
                assert rest[-1].finish is not None
                assert rest[-1].finish.reason == "interrupted"
                second = session.append("c", "And in winter?", seed=7, max_tokens=12)
                answer = [chunk async for chunk in second]
            known = [*(await client.tokenize(messages=question)).token_ids, *_ids(held)[:heard]]
            alone = await client.complete(token_ids=[*known, *delta], seed=7, max_tokens=12)
            same += tuple(_ids(answer)) == alone[0].token_ids
            assert answer[-1].finish is not None
            cached.append(answer[-1].finish.usage.cached_prompt_tokens / len(known))
    figure = {
        "rounds": rounds,
        "same_answers": same,
        "end_after_interrupt_ms": {"median": sorted(milliseconds)[rounds // 2], "most": max(milliseconds)},
        "tokens_after_interrupt": late,
        "least_share_of_history_cached": round(min(cached), 3),
    }
    return Verdict(figure, same == rounds and min(cached) > 0.7)


@claim("grpcurl drives a session through Envoy: start, append, interrupt, append, each event as it comes")
async def by_hand(stage: Stage) -> Verdict:
    async with stage.fleet(2) as fleet:
        talk = await _Grpcurl.start(fleet.target)
        sampling = {"temperature": 0, "maxTokens": 50, "ignoreEos": True}
        prompt = {"chat": {"messages": [{"role": "ROLE_USER", "content": "Water?"}]}}
        turn = {"conversationId": "c", "messages": [{"role": "ROLE_USER", "content": "And?"}], "sampling": sampling}
        request = {"prompt": prompt, "sampling": {**sampling, "maxTokens": 3}}
        talk.send({"start": {"generationId": "a", "conversationId": "c", "request": request}})
        first = await talk.until_finished("a")
        talk.send({"append": {**turn, "generationId": "b", "creditTokens": 5}})
        await talk.until_sent("b", 5)
        talk.send({"interrupt": {"generationId": "b", "heardTokens": 2}})
        second = await talk.until_finished("b")
        talk.send({"append": {**turn, "generationId": "d", "sampling": {**sampling, "maxTokens": 2}}})
        third = await talk.until_finished("d")
        status = await talk.end()
    lengths = [end["usage"]["promptTokens"] for end in (first, second, third)]
    # Every turn adds the same delta; between them stand 3 tokens of the first answer, and 2 of the second.
    figure = {
        "reasons": [end["reason"].removeprefix("FINISH_REASON_") for end in (first, second, third)],
        "prompt_tokens": lengths,
        "status": status,
    }
    is_exact = lengths[2] - lengths[1] == lengths[1] - lengths[0] - 1
    return Verdict(figure, figure["reasons"] == ["LENGTH", "INTERRUPTED", "LENGTH"] and is_exact and status == 0)


@claim("one consumer that grants no credit parks its own sequence only: 15 others get every token")
async def one_grants_nothing(stage: Stage) -> Verdict:
    count = 200

    async def run(session: AsyncSession, number: int) -> int:
        generation = session.start("Water", seed=number, max_tokens=count, ignore_eos=True)
        return len(_ids([chunk async for chunk in generation]))

    async with stage.fleet(1) as fleet, AsyncClient(fleet.target) as client, client.session() as session:
        seconds = {}
        for name in ("alone", "beside"):
            slow = session.start(
                "Water", seed=99, credit=7 if name == "beside" else 0, max_tokens=count, ignore_eos=True
            )
            held = await _take(slow, 7) if name == "beside" else []
            began = time.perf_counter()
            counts = await asyncio.gather(*(run(session, number) for number in range(15)))
            seconds[name] = round(time.perf_counter() - began, 3)
            await session.ping()
            more = slow._events.qsize()
            slow.grant(10 * count)
            total = len(_ids(held)) + len(_ids([chunk async for chunk in slow]))
    figure = {"of_the_others": sorted(set(counts)), "held_back_at": len(_ids(held)), "then": total, "seconds": seconds}
    return Verdict(figure, set(counts) == {count} and len(_ids(held)) == 7 and more == 0 and total == count)


@claim("a conversation's KV outlives other traffic while its lease runs, and not without")
async def lease(stage: Stage) -> Verdict:
    shares = {}
    for seconds in ("600", "0"):
        options = ("--kv-cache-tokens", "4096", "--conversation-lease", seconds)
        async with stage.fleet(1, *options) as fleet, AsyncClient(fleet.target) as client, client.session() as session:
            first = session.start(
                messages=[Message("user", QUESTION)], conversation="c", max_tokens=20, seed=1, ignore_eos=True
            )
            [chunk async for chunk in first]
            for number in range(20):  # 20 prompts of 300 tokens: more than the cache holds
                await client.complete(token_ids=[(number * 31 + i * 7) % 250 + 3 for i in range(300)], max_tokens=1)
            second = [chunk async for chunk in session.append("c", "And?", max_tokens=1)]
            assert second[-1].finish is not None
            usage = second[-1].finish.usage
            shares[seconds] = round(usage.cached_prompt_tokens / usage.prompt_tokens, 3)
    return Verdict({"share_cached_by_lease_seconds": shares}, shares["600"] > 0.7 and shares["0"] == 0.0)


def _ids(chunks: list[Chunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


async def _take(generation: AsyncSessionGeneration, count: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    while len(_ids(chunks)) < count:
        chunks.append(await asyncio.wait_for(generation.__anext__(), PATIENCE))
    return chunks


async def _delta(client: AsyncClient, text: str) -> list[int]:
    """The tokens that a user's turn adds behind an answer."""
    first = [Message("user", "x")]
    before = (await client.tokenize(messages=first)).token_ids
    whole = (await client.tokenize(messages=[*first, Message("assistant", ""), Message("user", text)])).token_ids
    return list(whole[len(before) :])


class _Grpcurl:
    """grpcurl on the Session method, its standard input kept open."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._text = ""
        self._decoder = json.JSONDecoder()
        self._sent: dict[str, int] = {}

    @classmethod
    async def start(cls, target: str) -> _Grpcurl:
        options = ("-plaintext", "-import-path", str(PROTOS), "-proto", "headrace/v1/inference.proto", "-d", "@")
        process = await asyncio.create_subprocess_exec(
            *(str(GRPCURL), *options, target, "headrace.v1.InferenceService/Session"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        return cls(process)

    def send(self, command: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")

    async def until_sent(self, name: str, count: int) -> None:
        while self._sent.get(name, 0) < count:
            await self._event()

    async def until_finished(self, name: str) -> dict[str, Any]:
        """Its finish."""
        while True:
            event = await self._event()
            chunk = event.get("chunk", {})
            if chunk.get("generationId") == name and "finish" in chunk["chunk"]:
                finish: dict[str, Any] = chunk["chunk"]["finish"]
                return finish

    async def end(self) -> int:
        """Half-close; grpcurl's exit status."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return await asyncio.wait_for(self._process.wait(), PATIENCE)

    async def _event(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while True:
            try:
                event, end = self._decoder.raw_decode(self._text.lstrip())
            except json.JSONDecodeError:
                more = await asyncio.wait_for(self._process.stdout.read(1 << 16), PATIENCE)
                assert more, f"grpcurl ended: {self._text}"
                self._text += more.decode()
                continue
            self._text = self._text.lstrip()[end:]
            assert "error" not in event, event
            chunk = event.get("chunk", {})
            if chunk:
                name = chunk["generationId"]
                self._sent[name] = self._sent.get(name, 0) + len(chunk["chunk"].get("tokenIds", []))
            answer: dict[str, Any] = event
            return answer
