"""Who is let in, and what those hear who are not: counts, forecasts, tenants, deadlines, degradation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from headrace.engine.types import BATCH, INTERACTIVE, STANDARD, EngineStats
from headrace.server import admission as admission_module
from headrace.server.admission import Admission, AdmissionLimits, Claim, RequestGuard
from headrace.server.concurrency import ConcurrencyLimit
from headrace.server.errors import OverloadedError, ServerError
from headrace.server.forecast import Backlog, Capacity, Work, finish_seconds, first_token_seconds
from headrace.v1 import inference_pb2 as pb

from tests.server import scripted_engine
from tests.server.raw_http2 import RawStream
from tests.server.support import Bench, bench, drained, failure, finish_of, tokens_request, until

_in_session = pytest.mark.asyncio(loop_scope="session")
CAPACITY = Capacity(max_num_seqs=4, token_budget=104, kv_tokens=1000)
# 10 ms and 0.1 ms a token make a step; a stream waits 20 ms for a token, a sequence is here for 2 s, uses half of its
# max_tokens and finds nothing in the cache.
COSTS = EngineStats(
    step_seconds=0.01, step_token_seconds=0.0001, token_seconds=0.02, residence_seconds=2.0, output_share=0.5
)


def admission(**changes: Any) -> Admission:
    made = Admission(AdmissionLimits(**{"max_live_sequences": 10, "max_live_tokens": 10_000, **changes}))
    made.observe(COSTS, CAPACITY)
    return made


def refused(attempt: Callable[[], RequestGuard]) -> str:
    with pytest.raises(ServerError) as caught:
        attempt()
    return caught.value.quota or caught.value.kind.reason


# ---- forecasts


def test_an_idle_server_needs_the_prompt_and_a_step() -> None:
    first = first_token_seconds(COSTS, CAPACITY, Backlog(0, 0, 0), Work(1, 50, 100))
    assert first == pytest.approx(0.01 + 50 * 0.0001 + 0.02)
    finish = finish_seconds(COSTS, CAPACITY, Backlog(0, 0, 0), Work(1, 50, 101))
    assert finish == pytest.approx(first + 0.5 * 100 * 0.02)


def test_prompts_ahead_take_the_budget_that_is_left() -> None:
    wait = first_token_seconds(COSTS, CAPACITY, Backlog(1, 1, 103 * 3), Work(1, 0, 1))
    assert wait == pytest.approx(3 * (0.01 + 104 * 0.0001) + 0.02)


def test_a_place_comes_free_every_residence_time_over_places() -> None:
    wait = first_token_seconds(COSTS, CAPACITY, Backlog(4, 2, 0), Work(1, 0, 1))
    assert wait == pytest.approx(3 * 2.0 / 4 + 0.02)


def test_without_experience_nobody_is_late() -> None:
    assert finish_seconds(EngineStats(), CAPACITY, Backlog(4, 100, 10_000), Work(4, 100, 100)) == 0.0


# ---- the limit by step time


def test_the_limit_falls_by_a_share_and_rises_by_steps() -> None:
    limit, now = ConcurrencyLimit(64, 0.1), 0.0
    values = []
    for token_seconds, used in [(0.2, 40), (0.2, 34), (0.05, 28), (0.05, 29), (0.05, 3), (0.2, 3)]:
        limit.observe(token_seconds, used, now)
        limit.observe(9.9, used, now)  # too soon: the effect of the last change is not known yet
        values.append(limit.value)
        now += 1.0
    assert values == [34, 28, 29, 30, 30, 2]


def test_the_limit_stays_within_its_bounds() -> None:
    limit = ConcurrencyLimit(8, 0.1)
    for i in range(50):
        limit.observe(0.01, 8, float(i))
    assert limit.value == 8
    for i in range(50, 100):
        limit.observe(1.0, 8, float(i))
    assert limit.value == 1
    assert ConcurrencyLimit(8, 0.0).value == 8


# ---- decisions


def test_what_would_wait_longer_than_the_slo_is_refused() -> None:
    ledger = admission(slo_ttft=1.0)
    guards = [ledger.open(1) for _ in range(5)]
    for guard in guards:
        guard.begin(1, 100)
    # 4 places; the 5th waits half a second, the 6th would wait a whole one, and for its step.
    assert refused(lambda: ledger.open(1)) == "queue"
    for guard in guards[:4]:
        guard.started()
    guards[0].close()
    ledger.open(1).close()


def test_a_deadline_that_cannot_be_met_is_refused_with_a_time_to_come_back() -> None:
    ledger = admission()
    ledger.open(1).begin(10, 100)
    with pytest.raises(ServerError) as caught:
        ledger.open(1, Claim(deadline=time.monotonic() + 0.5)).begin(10, 100)
    assert caught.value.kind.reason == "DEADLINE_UNMEETABLE"
    assert caught.value.retry_after is not None
    ledger.open(1, Claim(deadline=time.monotonic() + 2.0)).begin(10, 100)


def test_an_empty_server_tries_what_it_thinks_it_cannot() -> None:
    """Or an estimate that was once bad would stay so: only work brings news."""
    ledger = admission(slo_ttft=0.001)
    ledger.open(1, Claim(deadline=time.monotonic() + 0.5)).begin(1000, 1000)
    assert refused(lambda: ledger.open(1)) == "queue"


def test_an_expired_deadline_is_refused_even_then() -> None:
    ledger = admission()
    assert refused(lambda: ledger.open(1, Claim(deadline=time.monotonic()))) == "DEADLINE_UNMEETABLE"


def test_batch_is_refused_first() -> None:
    ledger = admission(batch_share=0.5)
    for _ in range(5):
        ledger.open(1)
    assert refused(lambda: ledger.open(1, Claim(priority=BATCH))) == "sequences"
    ledger.open(1, Claim(priority=STANDARD))
    ledger.open(1, Claim(priority=INTERACTIVE))


def test_the_kv_cache_bounds_what_is_admitted() -> None:
    ledger = admission(kv_overcommit=2.0)
    guard = ledger.open(1)
    guard.begin(1000, 900)
    other = ledger.open(1)
    with pytest.raises(OverloadedError) as caught:
        other.begin(50, 51)
    assert caught.value.quota == "KV cache"
    other.begin(50, 50)


def test_a_tenant_is_not_shut_out_by_one_that_came_first() -> None:
    ledger = admission()
    for _ in range(10):
        ledger.open(1, Claim("flood"))
    assert refused(lambda: ledger.open(1, Claim("flood"))) == "sequences"
    for _ in range(5):  # its fair share of 10
        ledger.open(1, Claim("other"))
    assert refused(lambda: ledger.open(1, Claim("other"))) == "sequences"


def test_a_tenant_waits_for_turns_not_for_anothers_queue() -> None:
    ledger = admission(slo_ttft=1.5, max_live_sequences=100)
    for _ in range(6):
        ledger.open(1, Claim("flood")).begin(1, 1)
    assert refused(lambda: ledger.open(1, Claim("flood"))) == "queue"
    ledger.open(1, Claim("other"))


def test_pushback_grows_with_the_age_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = admission(max_live_sequences=1)
    start = now = time.monotonic()
    monkeypatch.setattr(admission_module, "time", SimpleNamespace(monotonic=lambda: now))
    ledger.open(1).begin(1, 1)
    seconds = []
    for age in (0.0, 1.0, 4.0, 60.0):
        now = start + age
        with pytest.raises(OverloadedError) as caught:
            ledger.open(1)
        assert caught.value.retry_after is not None
        seconds.append(caught.value.retry_after)
        assert ledger.stats().queue_seconds == pytest.approx(age)
    assert seconds == sorted(seconds)
    assert 0.1 <= seconds[0] <= 0.125
    assert 10.0 <= seconds[-1] <= 12.5


def test_max_tokens_is_cut_under_pressure_only() -> None:
    ledger = admission(degrade_max_tokens=64)
    guards = [ledger.open(1) for _ in range(7)]
    assert guards[6].cap_max_tokens(100, 0) == 100
    last = ledger.open(1)
    assert (last.cap_max_tokens(100, 0), last.capped_to) == (64, 64)
    assert (last.cap_max_tokens(100, 80), last.capped_to) == (80, 80)
    assert (last.cap_max_tokens(30, 0), last.capped_to) == (30, 0)


def test_everything_is_given_back() -> None:
    ledger = admission()
    for number in range(6):
        guard = ledger.open(2, Claim(str(number % 2), number % 3))
        guard.begin(5, 5)
        for _ in range(number % 3):
            guard.started()
        guard.close()
        guard.close()
        guard.started()
    stats = ledger.stats()
    assert (stats.num_sequences, stats.num_tokens, stats.num_queued, stats.num_queued_tokens) == (0, 0, 0, 0)
    assert ledger._ledger.num_tenants == 0
    assert stats.queue_seconds == 0.0


# ---- through a server


async def _busy(server: Bench, count: int) -> list[Any]:
    """So many streams that run, and an engine that knows what a step costs."""
    calls = [server.stub.Generate(tokens_request([30 + i], max_tokens=400)) for i in range(count)]
    for call in calls:
        for _ in range(3):
            await call.read()
    return calls


@_in_session
async def test_deadlines_are_refused_by_forecast_and_never_by_status_four(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.05)
    async with bench(tiny_llama_gguf, engine, max_num_seqs=1, degrade_max_tokens=50, max_live_sequences=5) as server:
        await drained(server.stub.Generate(tokens_request(max_tokens=4)))
        calls = await _busy(server, 1)
        failed = await failure(drained(server.stub.Generate(tokens_request(max_tokens=100), timeout=1.0)))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DEADLINE_UNMEETABLE")
        assert failed.retry_seconds is not None
        assert failed.metadata["grpc-retry-pushback-ms"] == str(round(failed.retry_seconds * 1000))
        calls += [server.stub.Generate(tokens_request(max_tokens=2)) for _ in range(2)]
        await until(lambda: server.running.admission.stats().num_live == 3)
        # Three quarters full: the next is cut, and told so before its first token.
        cut = server.stub.Generate(tokens_request(max_tokens=400))
        assert dict(await cut.initial_metadata())["headrace-max-tokens"] == "50"
        calls[0].cancel()
        responses = await drained(cut)
        assert finish_of(responses).usage.generated_tokens == 50
        await server.idle_stats()


@_in_session
async def test_priority_decides_who_comes_next(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.02), max_num_seqs=1) as server:
        (first,) = await _busy(server, 1)
        ended: list[str] = []

        async def ask(name: str, priority: pb.Priority) -> None:
            request = tokens_request(max_tokens=1)
            request.priority = priority
            await drained(server.stub.Generate(request))
            ended.append(name)

        tasks = []
        for name, priority in (
            ("batch", pb.PRIORITY_BATCH),
            ("plain", pb.PRIORITY_UNSPECIFIED),
            ("chat", pb.PRIORITY_INTERACTIVE),
        ):
            tasks.append(asyncio.ensure_future(ask(name, priority)))
            count = len(tasks) + 1
            await until(lambda count=count: server.running.admission.stats().num_live == count)  # type: ignore[misc]
        first.cancel()
        await asyncio.gather(*tasks)
        assert ended == ["chat", "plain", "batch"]


@_in_session
async def test_the_tenant_is_what_the_proxy_says_last(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, tenant_header="x-tenant", max_live_sequences=2) as server:

        def ask(*tenants: str) -> Any:
            metadata = tuple(("x-tenant", tenant) for tenant in tenants)
            return server.stub.Generate(tokens_request(max_tokens=300), metadata=metadata)

        calls = [ask("a"), ask("a")]
        for call in calls:
            await call.read()
        assert (await failure(drained(ask("b", "a")))).reason == "OVERLOADED"  # "b" is what a client sent itself
        calls.append(ask("b"))  # its own share
        await calls[-1].read()
        for call in calls:
            call.cancel()
        await server.idle_stats()


async def _with_timeout(server: Bench, timeout: str) -> tuple[dict[str, str], int]:
    """Trailers, and the number of messages before them, of a call with this grpc-timeout."""
    raw = tokens_request(max_tokens=2).SerializeToString()
    stream = RawStream(server.running.port, "Generate", raw, headers=(("grpc-timeout", timeout),))
    await stream.open()
    try:
        return await stream.read_to_end(), len(stream.messages())
    finally:
        stream.abort()


@_in_session
@pytest.mark.parametrize("timeout", ["abc", "1", "10x", "-5S", ""])
async def test_a_malformed_timeout_is_refused_by_grpc_itself(counting: Bench, timeout: str) -> None:
    """With INTERNAL, before any handler of ours, so without a reason."""
    before = (await counting.stats()).num_steps
    trailers, num_messages = await _with_timeout(counting, timeout)
    assert (trailers["grpc-status"], num_messages) == ("13", 0)
    assert trailers["grpc-message"] == "Error parsing 'grpc-timeout' metadata"
    assert (await counting.idle_stats()).num_steps == before


@_in_session
async def test_a_timeout_of_ages_is_cut_to_the_servers_most(counting: Bench) -> None:
    trailers, num_messages = await _with_timeout(counting, "99999999H")
    assert trailers["grpc-status"] == "0"
    assert num_messages >= 1


@pytest.mark.parametrize("timeout", ["0n", "0S"])
@_in_session
async def test_a_call_without_any_time_runs_nothing(counting: Bench, timeout: str) -> None:
    """gRPC itself answers it; what has run out before it is read is refused by `Admission.open`."""
    before = (await counting.stats()).num_steps
    trailers, num_messages = await _with_timeout(counting, timeout)
    assert (trailers["grpc-status"], num_messages) == ("4", 0)
    assert (await counting.idle_stats()).num_steps == before
