"""Exactly-once resume: transcripts do not show which replicas died while they were written."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import re
import shutil
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from headrace.client import AsyncClient, Sampling
from headrace.client.resume import REPLICA_KEY
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

from tests.mesh.claims import Stage, Verdict, claim
from tests.mesh.fleet import Fleet

_NODE = Path(__file__).parents[3] / "clients" / "node"
_CONCURRENCY = 16
_WORDS = ("Water", "The wheel", "In 1769 the mill", "def turn(", "Größe und", "🙂 and")


@dataclass(frozen=True)
class Transcript:
    """All that a caller sees of a generation."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[float, ...]
    finish: tuple[str, str, int | None, int]
    token_hash: str


@dataclass
class _Killer:
    """Kills replicas at random and starts them again; one at least is always left."""

    fleet: Fleet
    num_kills: int = 0
    dead: set[int] = field(default_factory=set)  # replicas that are not back in rotation yet

    @contextlib.asynccontextmanager
    async def at_work(self, pause: tuple[float, float]) -> AsyncIterator[None]:
        """pause: seconds between two kills, from and to."""
        tasks = [asyncio.ensure_future(self._work(random.Random(seed), pause)) for seed in (4, 5)]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, rng: random.Random, pause: tuple[float, float]) -> None:
        while True:
            await asyncio.sleep(rng.uniform(*pause))
            alive = [replica for replica in self.fleet.replicas if replica.number not in self.dead]
            if len(alive) < 2:
                continue
            victim = rng.choice(alive)
            self.dead.add(victim.number)
            await victim.kill()
            self.num_kills += 1
            await self.fleet.restart(victim)
            self.dead.discard(victim.number)


def _request(number: int, max_tokens: int) -> tuple[str, Sampling]:
    """The number-th prompt and its parameters: plain, with penalties, with stop strings, with log-probabilities."""
    sampling: Sampling = {"seed": 1000 + number, "max_tokens": max_tokens, "ignore_eos": True}
    if number % 4 == 1:
        sampling.update(repetition_penalty=1.2, presence_penalty=0.5, min_tokens=20)
    elif number % 4 == 2:
        sampling.update(stop=["zq", "xj"], top_p=0.95)
    elif number % 4 == 3:
        sampling.update(logprobs=0, temperature=0.7)
    return f"{_WORDS[number % len(_WORDS)]} {number}", sampling


async def _transcript(client: AsyncClient, number: int, max_tokens: int, *, resume: bool) -> tuple[Transcript, int]:
    """One generation, and how often it was resumed."""
    prompt, sampling = _request(number, max_tokens)
    ids: list[int] = []
    text, logprobs, finish = "", [], None
    generation = client.generate(prompt, resume=resume, timeout=240, **sampling)
    async for chunk in generation:
        assert chunk.offset == len(ids), "a gap, or tokens twice"
        ids += chunk.token_ids
        text += chunk.text
        logprobs += [entry.logprob for entry in chunk.logprobs]
        finish = chunk.finish
    assert finish is not None
    assert finish.receipt is not None
    assert finish.usage.generated_tokens == len(ids)
    end = (finish.reason, finish.stop_string, finish.stop_token_id, finish.seed)
    transcript = Transcript(tuple(ids), text, tuple(logprobs), end, finish.receipt.token_hash)
    return transcript, generation.num_resumed


async def _all(client: AsyncClient, numbers: Sequence[int], max_tokens: int, *, resume: bool) -> list[Any]:
    """Their transcripts, some at a time; an exception in the place of one that was lost."""
    places = asyncio.Semaphore(_CONCURRENCY)

    async def one(number: int) -> tuple[Transcript, int]:
        async with places:
            return await _transcript(client, number, max_tokens, resume=resume)

    return await asyncio.gather(*(one(number) for number in numbers), return_exceptions=True)


async def _judge(fleet: Fleet, count: int, max_tokens: int, pause: tuple[float, float]) -> Verdict:
    numbers = range(count)
    async with AsyncClient(fleet.replicas[0].target) as client:
        undisturbed = await _all(client, numbers, max_tokens, resume=False)
    killer = _Killer(fleet)
    async with AsyncClient(fleet.target) as client, killer.at_work(pause):
        disturbed = await _all(client, numbers, max_tokens, resume=True)
    lost = [outcome for outcome in disturbed if isinstance(outcome, BaseException)]
    pairs = [(a[0], b) for a, b in zip(undisturbed, disturbed, strict=True) if not isinstance(b, BaseException)]
    equal = sum(wanted == transcript for wanted, (transcript, _) in pairs)
    resumed = [times for _, (_, times) in pairs]
    everything = hashlib.sha256(repr([wanted for wanted, _ in pairs]).encode()).hexdigest()[:12]
    figure = {
        "equal": equal,
        "of": count,
        "lost": len(lost),
        "kills": killer.num_kills,
        "resumed_generations": sum(times > 0 for times in resumed),
        "resumptions": sum(resumed),
        "distinct_transcripts": len({wanted.token_ids for wanted, _ in pairs}),
        "transcripts_sha256": everything,
        **({"first_loss": f"{lost[0]}"[:200]} if lost else {}),
    }
    return Verdict(figure, equal == count and killer.num_kills > 0 and sum(resumed) > 0)


@claim(
    "generations through Envoy over 3 replicas that are killed with -9 at random equal undisturbed runs", timeout=900
)
async def killed_at_random(stage: Stage) -> Verdict:
    async with stage.fleet(3) as fleet:
        count, max_tokens = (40, 400) if stage.is_quick else (200, 1200)
        return await _judge(fleet, count, max_tokens, (0.1, 0.7))


@claim("the same on the default model, SmolLM2-135M", quick=False, timeout=900)
async def killed_at_random_smollm2(stage: Stage) -> Verdict:
    async with stage.fleet(3, model=stage.smollm2) as fleet:
        return await _judge(fleet, 16, 160, (0.5, 2.0))


@claim("the Node client writes the same transcripts while replicas are killed")
async def killed_at_random_node(stage: Stage) -> Verdict:
    if shutil.which("node") is None or not (_NODE / "node_modules").is_dir():
        return Verdict({"SKIPPED": "no node here, or no `make node` before"}, passed=True)
    numbers = range(4 if stage.is_quick else 12)
    async with stage.fleet(3) as fleet:
        async with AsyncClient(fleet.replicas[0].target) as client:
            outcomes = await _all(client, numbers, 1500, resume=False)
        wanted = [(list(transcript.token_ids), transcript.text) for transcript, _ in outcomes]
        killer = _Killer(fleet)
        async with killer.at_work((0.2, 0.6)):
            found = await asyncio.gather(*(_node_transcript(fleet.target, number, 1500) for number in numbers))
    equal = sum(one == (ids, text) for one, (ids, text, _) in zip(wanted, found, strict=True))
    legs = sum(count for _, _, count in found)
    figure = {"equal": equal, "of": len(numbers), "kills": killer.num_kills, "generation_ids": legs}
    return Verdict(figure, equal == len(numbers) and killer.num_kills > 0)


async def _node_transcript(target: str, number: int, max_tokens: int) -> tuple[list[int], str, int]:
    """Tokens, text and under how many ids they were generated, by the example program of clients/node."""
    text, sampling = _request(number, max_tokens)
    camel = {re.sub("_(.)", lambda match: match[1].upper(), name): value for name, value in sampling.items()}
    arguments = (target, json.dumps({"text": text}), json.dumps(camel), "--resume", "--json")
    process = await asyncio.create_subprocess_exec(
        *("node", "examples/generate.js", *arguments), cwd=_NODE, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    chunks = [json.loads(line) for line in out.splitlines()]
    ids = [token_id for chunk in chunks for token_id in chunk["tokenIds"]]
    return ids, "".join(chunk["text"] for chunk in chunks), len({chunk["generationId"] for chunk in chunks})


@claim("a generation goes on, token for token, when the engine behind its replica is killed and the front end lives")
async def engine_killed(stage: Stage) -> Verdict:
    async with stage.fleet(1) as fleet, AsyncClient(fleet.target) as client:
        wanted, _ = await _transcript(client, 0, 1500, resume=False)
        task = asyncio.ensure_future(_transcript(client, 0, 1500, resume=True))
        await asyncio.sleep(0.3)
        fleet.replicas[0].kill_engine()
        found, resumed = await task
    return Verdict({"equal": found == wanted, "resumed": resumed}, found == wanted and resumed > 0)


@claim("through Envoy, Resume and Cancel find the replica that has the generation")
async def sticky(stage: Stage) -> Verdict:
    count, attached, idle = 12, 0, 0
    async with stage.fleet(3) as fleet, grpc.aio.insecure_channel(fleet.target) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for number in range(count):
            attached += await _lose_and_resume(stub, number)
        for replica in fleet.replicas:
            async with AsyncClient(replica.target) as direct:
                idle += await _is_idle(direct)
    return Verdict({"attached": attached, "of": count, "idle_replicas": idle}, attached == count and idle == 3)


async def _lose_and_resume(stub: Any, seed: int) -> bool:
    """Whether a call finds the generation of one that ended early; cancels it then."""
    sampling = pb.SamplingParams(seed=seed, max_tokens=3000, ignore_eos=True)
    call = stub.Generate(pb.GenerateRequest(prompt=pb.Prompt(text="Water"), sampling=sampling, resumable=True))
    chunk = (await call.read()).chunk
    metadata = ((REPLICA_KEY, dict(await call.initial_metadata())[REPLICA_KEY]),)
    call.cancel()
    held = len(chunk.token_ids)
    call = stub.Resume(pb.ResumeRequest(generation_id=chunk.generation_id, next_offset=held), metadata=metadata)
    found = (await call.read()).chunk
    await stub.Cancel(pb.CancelRequest(generation_id=chunk.generation_id), metadata=metadata)
    return bool(found.generation_id == chunk.generation_id and found.offset == held)


async def _is_idle(client: AsyncClient) -> bool:
    """Whether the engine has stopped stepping, long before the time of grace is over."""
    async with client.session() as session:
        for _ in range(50):
            before = (await session.ping()).engine_steps
            await asyncio.sleep(0.1)
            if (await session.ping()).engine_steps == before:
                return True
    return False
