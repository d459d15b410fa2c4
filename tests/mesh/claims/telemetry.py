"""Traces through Envoy into the engine, metrics that lead to them, a real Prometheus, and what all of it costs."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import statistics
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import yaml
from headrace.client import AsyncClient
from opentelemetry.sdk.trace import TracerProvider

from tests.mesh import fleet as fleets
from tests.mesh.claims import Stage, Verdict, claim
from tests.mesh.collector import Collector, collecting
from tests.mesh.fleet import Fleet, free_port, until

RULES = Path(__file__).parents[3] / "deploy" / "prometheus" / "headrace.rules.yaml"
_PARTS = ("tokenize", "queue", "prefill", "decode", "detokenize")


def _environment(target: str) -> dict[str, str]:
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{target}",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_METRIC_EXPORT_INTERVAL": "200",
    }


def _traced_by_envoy(target: str) -> Callable[[dict[str, Any]], None]:
    """Makes Envoy trace all calls to the collector."""
    host, port = target.split(":")
    api = "type.googleapis.com/envoy"

    def adapt(config: dict[str, Any]) -> None:
        fleets.http_manager(config)["tracing"] = {
            "random_sampling": {"value": 100},
            "spawn_upstream_span": True,
            "provider": {
                "name": "envoy.tracers.opentelemetry",
                "typed_config": {
                    "@type": f"{api}.config.trace.v3.OpenTelemetryConfig",
                    "service_name": "envoy",
                    "grpc_service": {"envoy_grpc": {"cluster_name": "collector"}, "timeout": "1s"},
                },
            },
        }
        address = {"address": {"socket_address": {"address": host, "port_value": int(port)}}}
        config["static_resources"]["clusters"].append(
            {
                "name": "collector",
                "type": "STATIC",
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": f"{api}.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": {"http2_protocol_options": {}},
                    }
                },
                "load_assignment": {
                    "cluster_name": "collector",
                    "endpoints": [{"lb_endpoints": [{"endpoint": address}]}],
                },
            }
        )

    return adapt


@claim("one trace holds the client's span, Envoy's and ours in one tree, and the metrics' exemplars lead to it")
async def one_trace(stage: Stage) -> Verdict:
    provider = TracerProvider()
    async with collecting() as collector:
        adapt = _traced_by_envoy(collector.target)
        async with stage.fleet(2, adapt=adapt, environment=_environment(collector.target)) as fleet:
            with provider.get_tracer("client").start_as_current_span("ask") as root:
                async with AsyncClient(fleet.target) as client:
                    await client.complete("Water is", max_tokens=24)
            context = root.get_span_context()
            trace_id = format(context.trace_id, "032x")
            ours = {"gen_ai.server.time_to_first_token", "rpc.server.call.duration"}
            await until(lambda: _is_whole(collector, trace_id), "the trace")
            await until(lambda: all(trace_id in collector.exemplars.get(name, ()) for name in ours), "exemplars")
    spans = {span.span_id: span for span in collector.trace(trace_id)}
    (server,) = [span for span in spans.values() if span.attributes.get("rpc.system.name") == "grpc"]
    way: list[str] = []
    above = server
    while above.parent_id in spans:
        above = spans[above.parent_id]
        way.append(above.service)
    hangs = above.parent_id == format(context.span_id, "016x") and set(way) == {"envoy"}
    below = sorted({span.name for span in spans.values() if span.parent_id == server.span_id})
    steps = [span for span in collector.spans if span.name == "engine.step" and server.span_id in span.links]
    figure = {"above": ["client", *reversed(way)], "below": below, "linked_steps": len(steps), "spans": len(spans)}
    return Verdict(figure, hangs and set(below) == set(_PARTS) and bool(steps))


def _is_whole(collector: Collector, trace_id: str) -> bool:
    names = {span.name for span in collector.trace(trace_id)}
    services = {span.service for span in collector.trace(trace_id)}
    return names >= set(_PARTS) and services == {"envoy", "headrace"}


@claim("a real Prometheus scrapes a replica, takes the shipped rules, and reads its counts")
async def prometheus(stage: Stage) -> Verdict:
    binary = shutil.which("prometheus")
    if binary is None:
        return Verdict({"SKIPPED": "no prometheus here; on Debian, apt install prometheus"}, passed=True)
    metrics_port, port = free_port(), free_port()
    config = {
        "global": {"scrape_interval": "200ms", "evaluation_interval": "200ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "headrace", "static_configs": [{"targets": [f"127.0.0.1:{metrics_port}"]}]}],
    }
    path = stage.folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    async with stage.fleet(1, "--metrics-port", str(metrics_port)) as fleet, AsyncClient(fleet.target) as client:
        with (stage.folder / "prometheus.log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(binary, f"--config.file={path}", f"--storage.tsdb.path={stage.folder / 'tsdb'}"),
                *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
                stdout=log,
                stderr=log,
            )
        try:
            for _ in range(20):
                await client.complete("Water", max_tokens=4, ignore_eos=True)
            requests = "sum(gen_ai_server_request_duration_seconds_count)"
            await until(lambda: _query(port, requests) == 20.0, "20 requests in Prometheus")
            await until(lambda: _query(port, "headrace:kv_used:ratio") is not None, "a recorded series")
            figure = {
                "up": _query(port, "up"),
                "requests": _query(port, requests),
                "output_tokens": _query(port, 'sum(headrace_tokens_total{gen_ai_token_type="output"})'),
                "steps": _query(port, "headrace_engine_steps_total"),
            }
        finally:
            process.kill()
            await process.wait()
    return Verdict(figure, (figure["up"], figure["output_tokens"]) == (1.0, 80.0))


def _query(port: int, expression: str) -> float | None:
    """The first value of an instant query; None where there is none, or no answer yet."""
    url = f"http://127.0.0.1:{port}/api/v1/query?query={urllib.parse.quote(expression)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
    except OSError:
        return None
    return float(result[0]["value"][1]) if result else None


@claim("a collector that is dead, or that hangs, changes nothing: every call is answered, and the server ends in time")
async def dead_collector(stage: Stage) -> Verdict:
    hanging = socket.create_server(("127.0.0.1", 0))  # the kernel takes connections, nobody answers
    seconds: dict[str, list[float]] = {"live": [], "dead": [], "hanging": []}
    answered = 0
    async with collecting() as collector:
        targets = {
            "live": collector.target,
            "dead": f"127.0.0.1:{free_port()}",
            "hanging": f"127.0.0.1:{hanging.getsockname()[1]}",
        }
        environments = {name: _environment(target) for name, target in targets.items()}
        async with fleets_of(stage, environments) as servers:
            for _ in range(3 if stage.is_quick else 9):
                for name, fleet in servers.items():
                    async with AsyncClient(fleet.replicas[0].target) as client:
                        start = time.monotonic()
                        calls = (client.complete("Water", max_tokens=16) for _ in range(100))
                        answered += len(await asyncio.gather(*calls))
                        seconds[name].append(time.monotonic() - start)
            ends = {name: await _seconds_to_end(fleet) for name, fleet in servers.items()}
    hanging.close()
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    num_calls = sum(map(len, seconds.values())) * 100
    figure = {
        "answered": answered,
        "of": num_calls,
        "seconds_over_live": {name: round(medians[name] / medians["live"], 2) for name in ("dead", "hanging")},
        "seconds_to_exit": ends,
    }
    return Verdict(figure, answered == num_calls and all(end < 10 for end in ends.values()))


async def _seconds_to_end(fleet: Fleet) -> float:
    """From SIGTERM to the end of a replica that has nothing to do. Raises RuntimeError where its status is not 0."""
    start = time.monotonic()
    fleet.replicas[0].terminate()
    status = await fleet.replicas[0].wait()
    if status != 0:
        raise RuntimeError(f"the replica ended with status {status}")
    return round(time.monotonic() - start, 2)


@claim("traces and metrics cost at most 2 % of the throughput of the default model, 16 streams", timeout=600.0)
async def cost(stage: Stage) -> Verdict:
    """CPU time per token of both processes: on a shared machine the clock on the wall says nothing about 2 %."""
    rounds, most = (6, 1.05) if stage.is_quick else (16, 1.02)  # a few rounds cannot tell 1 % from 3 %
    spent: dict[str, list[float]] = {"off": [], "on": []}
    async with collecting() as collector:
        environments = {"off": {}, "on": {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.target}"}}
        async with fleets_of(stage, environments, model=stage.smollm2) as servers:
            for number in range(rounds + 1):
                for name, fleet in servers.items():
                    microseconds = await _load(fleet, number)
                    if number:  # the first round warms up
                        spent[name].append(microseconds)
        num_spans = len(collector.spans)
    ratio = statistics.median(on / off for on, off in zip(spent["on"], spent["off"], strict=True))
    figure = {"cpu_per_token_ratio": round(ratio, 4), "us_per_token_off": round(statistics.median(spent["off"]), 1)}
    return Verdict({**figure, "rounds": rounds, "spans": num_spans}, ratio <= most and num_spans > 0)


@asynccontextmanager
async def fleets_of(
    stage: Stage, environments: Mapping[str, Mapping[str, str]], model: Path | None = None
) -> AsyncIterator[dict[str, Fleet]]:
    """A replica for each environment, running side by side."""
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(
                fleets.start(1, model or stage.tiny, stage.folder / name, environment=environment)
            )
            for name, environment in environments.items()
        }


async def _load(fleet: Fleet, number: int) -> float:
    """CPU microseconds per token of a replica that answers 16 requests at once."""
    replica = fleet.replicas[0]
    processes = [psutil.Process(replica.process.pid), psutil.Process(replica.engine_pid())]
    before = sum(sum(process.cpu_times()[:2]) for process in processes)
    async with AsyncClient(replica.target) as client:
        calls = (
            client.complete(f"{number} {i} says:", max_tokens=64, ignore_eos=True, temperature=0.0) for i in range(16)
        )
        await asyncio.gather(*calls)
    spent = sum(sum(process.cpu_times()[:2]) for process in processes) - before
    return spent / (16 * 64) * 1e6
