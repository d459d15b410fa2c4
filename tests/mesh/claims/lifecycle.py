"""Start, health and end of a replica: SERVING soon, NOT_SERVING at once, restarts that nobody notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.client import AsyncClient, HeadraceError

from tests.mesh import fleet as fleets
from tests.mesh.claims import Stage, Verdict, claim

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@claim("health Watch says NOT_SERVING within 100 ms of SIGTERM, while streams go on to their end")
async def watch_flips(stage: Stage) -> Verdict:
    seconds, lengths = [], []
    rounds = 3 if stage.is_quick else 10
    async with stage.fleet(1, "--lame-duck", "0.5") as fleet:
        replica = fleet.replicas[0]
        for _ in range(rounds):
            async with AsyncClient(replica.target) as client, grpc.aio.insecure_channel(replica.target) as channel:
                stub: Any = health_pb2_grpc.HealthStub(channel)
                watch = stub.Watch(health_pb2.HealthCheckRequest(service=fleets.MODEL_NAME))
                assert (await watch.read()).status == _SERVING
                running = asyncio.ensure_future(client.complete("Water", max_tokens=600, ignore_eos=True))
                await asyncio.sleep(0.1)
                begin = time.monotonic()
                replica.terminate()
                assert (await watch.read()).status == _NOT_SERVING
                seconds.append(time.monotonic() - begin)
                lengths.append(len((await running)[0].token_ids))
            status = await replica.wait()
            assert status == 0, f"exit status {status}"
            await replica.start()
    figure = {"rounds": rounds, "ms": [round(1000 * s, 1) for s in seconds], "tokens": lengths}
    return Verdict(figure, max(seconds) <= 0.1 and lengths == [600] * rounds)


@claim("3 replicas restarted one after the other under 70 % load through Envoy: no call fails", timeout=1200.0)
async def rolling_restart(stage: Stage) -> Verdict:
    return await _roll(stage, stage.tiny, 800 if stage.is_quick else 10_000)


@claim("the same on the default model", quick=False, timeout=600.0)
async def rolling_restart_default_model(stage: Stage) -> Verdict:
    return await _roll(stage, stage.smollm2, 600)


async def _roll(stage: Stage, model: Path, wanted: int) -> Verdict:
    outcomes: Counter[str] = Counter()
    options = ("--max-num-seqs", "8", "--lame-duck", "2")
    async with stage.fleet(3, *options, model=model) as fleet, AsyncClient(fleet.target) as client:
        rate = 0.7 * await _capacity(client)
        restarted = asyncio.ensure_future(_restart_all(fleet))
        tasks: set[asyncio.Future[None]] = set()
        due, number = time.monotonic(), 0
        while number < wanted or not restarted.done():
            due = max(due + 1 / rate, time.monotonic() - 1.0)  # never make good for more than a second
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.ensure_future(_ask(client, outcomes, number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            number += 1
        await restarted
        await asyncio.gather(*tasks)
        starts = [replica.num_starts for replica in fleet.replicas]
    figure = {"calls": number, "per_second": round(rate, 1), "outcomes": dict(outcomes), "starts": starts}
    return Verdict(figure, outcomes["ok"] == number and min(starts) >= 2)


async def _capacity(client: AsyncClient) -> float:
    """Calls per second that 16 clients get, at most 40: more would only show what the load generator can do."""
    outcomes: Counter[str] = Counter()
    begin = time.monotonic()

    async def one_after_another() -> None:
        for number in range(4):
            await _ask(client, outcomes, number)

    await asyncio.gather(*(one_after_another() for _ in range(16)))
    return min(40.0, 64 / (time.monotonic() - begin))


async def _ask(client: AsyncClient, outcomes: Counter[str], number: int) -> None:
    """A stream, or now and then a unary call."""
    try:
        if number % 4:
            async with client.generate(token_ids=[20, 21, number % 200], max_tokens=12, ignore_eos=True) as chunks:
                count = 0
                async for chunk in chunks:
                    count += len(chunk.token_ids)
        else:
            (answer,) = await client.complete("Water", max_tokens=12, ignore_eos=True)
            count = len(answer.token_ids)
        outcomes["ok" if count == 12 else "short"] += 1
    except HeadraceError as error:
        outcomes[error.reason or error.code.name] += 1


async def _restart_all(fleet: fleets.Fleet) -> None:
    for replica in fleet.replicas:
        await asyncio.sleep(1.0)
        replica.terminate()
        status = await replica.wait()
        assert status == 0, f"exit status {status}"
        await fleet.restart(replica)


@claim("the default model is SERVING within 3 s of the start of the process")
async def start(stage: Stage) -> Verdict:
    seconds = []
    for number in range(4):  # the first one may have to pack the weights
        taken = await _start_seconds(stage, number)
        if number:
            seconds.append(round(taken, 2))
    return Verdict({"seconds": seconds, "best": min(seconds)}, min(seconds) <= 3.0)


async def _start_seconds(stage: Stage, number: int) -> float:
    """From exec until health says SERVING."""
    port = fleets.free_port()
    command = [sys.executable, "-m", "headrace.server.cli", "serve", "--json", "--lame-duck", "0"]
    command += ["--model", str(stage.smollm2), "--port", str(port)]
    begin = time.monotonic()
    with open(stage.folder / f"start{number}.log", "wb") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log)
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 120)
        seconds = time.monotonic() - begin
        async with grpc.aio.insecure_channel(json.loads(line)["target"]) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest())).status == _SERVING
        return seconds
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGTERM)
        await process.wait()
