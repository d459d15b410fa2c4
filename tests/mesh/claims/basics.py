"""The fleet itself: every replica is reached through Envoy, and one that dies is not missed for long."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from headrace.client import AsyncClient, HeadraceError

from tests.mesh.claims import Stage, Verdict, claim


@claim("calls through Envoy reach every replica, and stream the tokens that a replica gives by itself")
async def spread(stage: Stage) -> Verdict:
    async with stage.fleet(3) as fleet:
        async with AsyncClient(fleet.replicas[0].target) as client:
            direct = await client.complete("Water", seed=5, max_tokens=24)
        async with AsyncClient(fleet.target) as client:
            answers = await asyncio.gather(*(client.complete("Water", seed=5, max_tokens=24) for _ in range(60)))
        text = await fleet.envoy.admin("/clusters")
        calls = {
            line.split("::")[1]: int(line.rpartition("::")[2]) for line in text.splitlines() if "::rq_success::" in line
        }
    tokens = Counter(answer[0].token_ids for answer in answers)
    is_same = list(tokens) == [direct[0].token_ids]
    return Verdict(
        {"calls_per_replica": sorted(calls.values()), "transcripts": len(tokens)}, is_same and all(calls.values())
    )


@claim("after a replica is killed with -9, Envoy and the others answer every new call, and it is back in rotation soon")
async def one_dies(stage: Stage) -> Verdict:
    failures = 0
    async with stage.fleet(3) as fleet, AsyncClient(fleet.target) as client:
        await fleet.replicas[1].kill()
        for _ in range(40):
            failures += not await _answers(client)
        start = time.monotonic()
        await fleet.restart(fleet.replicas[1])
        seconds = round(time.monotonic() - start, 2)
    return Verdict({"failures_of_40": failures, "seconds_until_back": seconds}, failures == 0)


async def _answers(client: AsyncClient) -> bool:
    try:
        return bool(await client.complete("Water", max_tokens=2, timeout=10))
    except HeadraceError:
        return False
