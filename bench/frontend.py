"""What the front end costs per message, beside a bare grpc.aio handler on uvloop that writes the same bytes.

Both send 64 streams one token every 25 ms; rounds alternate. The engine is the counting one of the tests, in its own
process, so that the front end's processor time is all that is counted. Goals: at most 15 % more per message than the
bare handler, at most a quarter of a core in all. Ends in one JSON line.

    python bench/frontend.py --rounds 3 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from headrace.models.catalogue import cache_root  # noqa: E402
from headrace.server import loop  # noqa: E402
from headrace.v1 import inference_pb2 as pb  # noqa: E402

from tests.server import scripted_engine  # noqa: E402

_METHOD = "/headrace.v1.InferenceService/Generate"
_STREAMS, _TICK = 64, 0.025
_GOAL_RATIO, _GOAL_CORES = 1.15, 0.25
_MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--bare", help="(internal) be the bare server, writing these bytes")
    options = parser.parse_args()
    if options.bare:
        loop.run(_bare_server(bytes.fromhex(options.bare)))
        return
    message = pb.GenerateResponse(
        chunk=pb.GenerationChunk(offset=100, token_ids=[100], text=" word", generation_id="0" * 32)
    ).SerializeToString()
    with ExitStack() as stack:
        ours = stack.enter_context(_server(_ours_command()))
        bare = stack.enter_context(_server([sys.executable, __file__, "--bare", message.hex()]))
        for _, _, warm_up in ((0, 0, ours), (0, 0, bare)):
            loop.run(measure(warm_up, 1.0))
        figures: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
        for number in range(options.rounds):
            order = (("ours", ours), ("bare", bare)) if number % 2 else (("bare", bare), ("ours", ours))
            for name, server in order:
                figures[name].append(loop.run(measure(server, options.seconds)))
            print(f"round {number}: " + ", ".join(f"{n} {f[-1][0]:.1f} µs/message" for n, f in figures.items()))
    result = summary(figures)
    print(json.dumps(result))
    sys.exit(0 if result["passed"] else 1)


def summary(figures: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians over the rounds, and whether the goals are kept."""
    micros = {name: statistics.median(cost for cost, _ in rounds) for name, rounds in figures.items()}
    ratio = statistics.median(a[0] / b[0] for a, b in zip(figures["ours"], figures["bare"], strict=True))
    # At the full rate, which a busy machine may not reach.
    cores = micros["ours"] / 1e6 * _STREAMS / _TICK
    return {
        "bench": "frontend",
        "streams": _STREAMS,
        "tick_ms": _TICK * 1000,
        "micros_per_message": {name: round(value, 1) for name, value in micros.items()},
        "ratio": round(ratio, 3),
        "cores": round(cores, 3),
        "passed": ratio <= _GOAL_RATIO and cores <= _GOAL_CORES,
    }


async def measure(server: tuple[int, int], seconds: float) -> tuple[float, float]:
    """(microseconds of processor time per message, cores used) of the process (port, pid) with all streams running."""
    port, pid = server
    process = psutil.Process(pid)
    counts = [0] * _STREAMS
    request = pb.GenerateRequest(
        prompt=pb.Prompt(tokens=pb.TokenIds(ids=[50])),
        sampling=pb.SamplingParams(temperature=0.0, max_tokens=480, ignore_eos=True),
    ).SerializeToString()

    async def read(index: int, channel: grpc.aio.Channel) -> None:
        async for _ in channel.unary_stream(_METHOD)(request):
            counts[index] += 1

    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        tasks = [asyncio.ensure_future(read(index, channel)) for index in range(_STREAMS)]
        while min(counts) < 10:
            await asyncio.sleep(_TICK)
        begin, before, cpu = time.monotonic(), sum(counts), _cpu_seconds(process)
        await asyncio.sleep(seconds)
        spent = _cpu_seconds(process) - cpu
        elapsed, sent = time.monotonic() - begin, sum(counts) - before
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return spent / sent * 1e6, spent / elapsed


def _cpu_seconds(process: psutil.Process) -> float:
    """Of all threads, in nanoseconds' precision where the kernel counts them."""
    total = 0.0
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0]) / 1e9
    return total


def _ours_command() -> list[str]:
    child = Path(scripted_engine.__file__).with_name("serve_child.py")
    settings = json.dumps({"log_format": "json"})
    engine = scripted_engine.command(step_seconds=_TICK)
    return [sys.executable, str(child), str(cache_root() / _MODEL), settings, *engine]


@contextmanager
def _server(command: list[str]) -> Iterator[tuple[int, int]]:
    """(port, pid) of a server that prints its port as JSON, and a second line when it is ready."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
    try:
        assert process.stdout is not None
        port = int(json.loads(process.stdout.readline())["port"])
        process.stdout.readline()
        yield port, process.pid
    finally:
        process.terminate()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def _bare_server(message: bytes) -> None:
    """Each tick wakes every stream's handler, as a step of the engine does; the handler writes."""
    waiters: set[asyncio.Future[None]] = set()
    running = asyncio.get_running_loop()

    async def handler(_: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.send_initial_metadata(())
        for _ in range(480):
            waiter = running.create_future()
            waiters.add(waiter)
            await waiter
            await context.write(message)

    server = grpc.aio.server()
    handlers = {"Generate": grpc.unary_stream_rpc_method_handler(handler)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("headrace.v1.InferenceService", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"port": port}), flush=True)
    print(json.dumps({"ready": True}), flush=True)
    while True:
        await asyncio.sleep(_TICK)
        woken = [waiter for waiter in waiters if not waiter.done()]
        waiters.clear()
        for waiter in woken:
            waiter.set_result(None)


if __name__ == "__main__":
    main()
