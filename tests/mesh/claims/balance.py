"""Envoy's weighted round robin by the replicas' own load reports."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

from headrace.client import AsyncClient
from headrace.server.orca import Load

from tests.mesh import fleet as fleets
from tests.mesh.claims import Stage, Verdict, claim
from tests.server import scripted_engine
from tests.server.support import bench

_CALLS = 400
_WRR = "client_side_weighted_round_robin"


def _adapt(out_of_band: bool) -> fleets.Adapt:
    def adapt(config: dict[str, Any]) -> None:
        cluster = fleets.cluster(config)
        kind = f"type.googleapis.com/envoy.extensions.load_balancing_policies.{_WRR}.v3.ClientSideWeightedRoundRobin"
        policy: dict[str, Any] = {"@type": kind, "blackout_period": "0.5s", "weight_update_period": "0.5s"}
        if out_of_band:
            policy |= {"enable_oob_load_report": True, "oob_reporting_period": "0.5s"}
        del cluster["lb_policy"]
        extension = {"name": f"envoy.load_balancing_policies.{_WRR}", "typed_config": policy}
        cluster["load_balancing_policy"] = {"policies": [{"typed_extension_config": extension}]}

    return adapt


async def _shares(stage: Stage, *, out_of_band: bool) -> list[int]:
    """Calls that two replicas get of which one reports a load of 0.9 and the other of 0.1, at equal rates of calls.
    They run in this process, where the test can say what they report."""
    async with AsyncExitStack() as stack:
        replicas = []
        for load in (0.9, 0.1):
            replica = await stack.enter_async_context(bench(stage.tiny, scripted_engine.command()))
            replica.running.load.measure = lambda load=load: Load(application=load, rps=50.0)  # type: ignore[misc]
            replicas.append(replica)
        envoy = fleets.Envoy(stage.folder, [replica.running.port for replica in replicas], _adapt(out_of_band))
        stack.push_async_callback(envoy.stop)
        await envoy.start()
        ports = {replica.running.port for replica in replicas}

        async def is_healthy() -> bool:
            return await envoy.healthy_ports() & ports == ports

        await fleets.until(is_healthy, "two healthy replicas")
        client = await stack.enter_async_context(AsyncClient(envoy.target))
        for _ in range(25):  # reports come with calls; the weights after the blackout
            await client.complete("Water", max_tokens=1)
            await asyncio.sleep(0.1)
        before = [replica.running.admission.stats().num_created for replica in replicas]
        for _ in range(_CALLS):
            await client.complete("Water", max_tokens=1)
        after = [replica.running.admission.stats().num_created for replica in replicas]
        return [b - a for a, b in zip(before, after, strict=True)]


@claim("a replica that reports a load of 0.9 gets a ninth of the calls of one that reports 0.1 (trailers)")
async def by_trailers(stage: Stage) -> Verdict:
    busy, idle = await _shares(stage, out_of_band=False)
    return Verdict({"calls": [busy, idle], "ratio": round(idle / max(1, busy), 2)}, 8.0 <= idle / max(1, busy) <= 10.0)


@claim("the same by the stream of load reports (OpenRcaService)")
async def by_stream(stage: Stage) -> Verdict:
    busy, idle = await _shares(stage, out_of_band=True)
    return Verdict({"calls": [busy, idle], "ratio": round(idle / max(1, busy), 2)}, 8.0 <= idle / max(1, busy) <= 10.0)
