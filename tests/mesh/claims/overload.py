"""Ten times more than the fleet can do, for a minute: who is admitted is served in time, others are told at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.client import AsyncClient, HeadraceError

from tests.mesh import scripted
from tests.mesh.claims import Stage, Verdict, claim

_SLO = 0.5  # seconds to the first token
_STEP = 0.02
_PLACES, _TOKENS = 4, 16  # of each replica; of each answer
_CAPACITY = 2 * _PLACES / (_TOKENS * _STEP)  # requests per second of two replicas
_RAMP = 1.0  # seconds until a load is what it is
_REFUSALS = grpc.StatusCode.RESOURCE_EXHAUSTED


@dataclass
class Phase:
    """What became of the requests of one load. Times in seconds."""

    begin: float
    seconds: float
    ends: list[float] = field(default_factory=list)  # of those whose first token came within what is promised
    ttft: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)  # how long each took
    failures: list[str] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Requests per second that were completed, and had their first token within what is promised; from a second
        after the beginning to the end, so that what is still under way then counts as little as what was at first."""
        end = self.begin + self.seconds
        return sum(self.begin + _RAMP < at <= end for at in self.ends) / (self.seconds - _RAMP)


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def _p99(values: list[float]) -> float:
    return _quantile(values, 0.99)


async def _offer(client: AsyncClient, rate: float, seconds: float) -> Phase:
    """An open loop: requests arrive as a Poisson process, whatever becomes of those before."""
    phase, tasks = Phase(time.monotonic(), seconds), []
    due, end = phase.begin, phase.begin + seconds
    while True:
        due += random.expovariate(rate)
        if due > end:
            break
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.ensure_future(_ask(client, phase)))
    await asyncio.gather(*tasks)
    return phase


async def _ask(client: AsyncClient, phase: Phase) -> None:
    begin = time.monotonic()
    try:
        async with client.generate(token_ids=[20, 21, 22], max_tokens=_TOKENS, temperature=0.0, timeout=30) as chunks:
            first = None
            async for _ in chunks:
                first = first or time.monotonic()
        phase.ttft.append((first or time.monotonic()) - begin)
        if phase.ttft[-1] <= 2 * _SLO:
            phase.ends.append(time.monotonic())
    except HeadraceError as error:
        if error.code is _REFUSALS:
            phase.refusals.append(time.monotonic() - begin)
        else:
            phase.failures.append(error.reason or error.code.name)


@asynccontextmanager
async def _probes(ports: tuple[int, ...]) -> AsyncIterator[list[tuple[int, float]]]:
    """Health of every replica, asked five times a second: (status, seconds)."""
    seen: list[tuple[int, float]] = []

    async def probe(port: int) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while True:
                begin = time.monotonic()
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
                seen.append((answer.status, time.monotonic() - begin))
                await asyncio.sleep(0.2)

    tasks = [asyncio.ensure_future(probe(port)) for port in ports]
    try:
        yield seen
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@claim(
    "at 10x capacity goodput stays at 95 % of its peak, p99 TTFT of the admitted within 2x the SLO, p99 of refusals "
    "within 50 ms, health SERVING; baseline again within 5 s"
)
async def overload(stage: Stage) -> Verdict:
    length, step = (15.0, 4.0) if stage.is_quick else (60.0, 10.0)
    settings = {"max_num_seqs": _PLACES, "slo_ttft": _SLO, "log_format": "json"}
    async with (
        scripted.start(stage, 2, step_seconds=_STEP, **settings) as fleet,
        AsyncClient(fleet.envoy.target, retries=False) as client,
    ):
        await _offer(client, 0.5 * _CAPACITY, 2.0)  # the estimates begin
        before = await _offer(client, 0.5 * _CAPACITY, step)
        ramp = [await _offer(client, share * _CAPACITY, step) for share in (0.8, 1.0, 1.3)]
        async with _probes(fleet.ports) as probes:
            over = await _offer(client, 10 * _CAPACITY, length)
        await asyncio.sleep(5.0)
        after = await _offer(client, 0.5 * _CAPACITY, step)
    peak = max(phase.goodput for phase in [*ramp, over])
    figure = {
        "capacity_per_second": round(_CAPACITY, 1),
        "offered_per_second": round(10 * _CAPACITY),
        "goodput_ramp": [round(phase.goodput, 1) for phase in ramp],
        "goodput": round(over.goodput, 1),
        "share_of_peak": round(over.goodput / peak, 3),
        "refused": len(over.refusals),
        "p99_refusal_ms": round(_p99(over.refusals) * 1000, 1),
        "probes": len(probes),
        "p99_probe_ms": round(_p99([seconds for _, seconds in probes]) * 1000, 1),
        "ttft_over_slo": [round(_quantile(over.ttft, q) / _SLO, 2) for q in (0.5, 0.9, 0.99)],
        "ttft_before": [round(_quantile(before.ttft, q), 3) for q in (0.5, 0.9, 0.99)],
        "ttft_after": [round(_quantile(after.ttft, q), 3) for q in (0.5, 0.9, 0.99)],
        "failures": sorted(set(before.failures + over.failures + after.failures)),
    }
    share, slack = (0.8, 3.0) if stage.is_quick else (0.95, 1.0)  # CI shares its cores; the long form is the claim
    passed = (
        over.goodput >= share * peak
        and _p99(over.ttft) <= slack * 2 * _SLO
        and _p99(over.refusals) <= slack * 0.05
        and all(status == health_pb2.HealthCheckResponse.SERVING for status, _ in probes)
        and _quantile(after.ttft, 0.9) <= max(1.5 * _quantile(before.ttft, 0.9), _SLO)
        and not figure["failures"]
        and not after.refusals
    )
    return Verdict(figure, passed)


@claim(
    "the default model at 10x capacity: every call is answered or refused, health SERVING, served again after",
    quick=False,
)
async def overload_default_model(stage: Stage) -> Verdict:
    """The load generator shares the cores with the model, so times are shown and not judged."""
    options = ("--max-num-seqs", str(_PLACES), "--slo-ttft", str(_SLO))
    async with (
        stage.fleet(2, *options, model=stage.smollm2) as fleet,
        AsyncClient(fleet.target, retries=False) as client,
    ):
        begin, warm = time.monotonic(), Phase(time.monotonic(), 1.0)
        for _ in range(8):
            await asyncio.gather(*(_ask(client, warm) for _ in range(2 * _PLACES)))
        capacity = len(warm.ttft) / (time.monotonic() - begin)
        async with _probes(tuple(replica.port for replica in fleet.replicas)) as probes:
            over = await _offer(client, 10 * capacity, 30.0)
        await asyncio.sleep(5.0)
        after = await _offer(client, 0.3 * capacity, 5.0)
    figure = {
        "capacity_per_second": round(capacity, 1),
        "answered": len(over.ttft),
        "refused": len(over.refusals),
        "p99_refusal_ms": round(_p99(over.refusals) * 1000, 1),
        "ttft_over_slo": [round(_quantile(over.ttft, q) / _SLO, 2) for q in (0.5, 0.9, 0.99)],
        "probes": len(probes),
        "failures": sorted(set(warm.failures + over.failures + after.failures)),
    }
    is_serving = all(status == health_pb2.HealthCheckResponse.SERVING for status, _ in probes)
    served = bool(over.refusals) and bool(over.ttft) and bool(after.ttft)
    return Verdict(figure, served and is_serving and not figure["failures"] and not after.refusals)
