"""Sends a planned load over gRPC with the asyncio client, and looks after the server that a bench starts for itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Timer

import psutil
from headrace.client import AsyncClient, HeadraceError
from headrace.server.cli.load import PlannedRequest, Record, Workload
from headrace.server.cli.output import CommandError

_START_SECONDS = 300.0
_STOP_SECONDS = 60.0


async def send(client: AsyncClient, workload: Workload, planned: Sequence[PlannedRequest]) -> list[Record]:
    """Sends everything and returns what was seen, in the order of the plan."""
    start = time.monotonic()
    # In a closed loop a request is due when a stream gets free, which is when its record is made.
    free = asyncio.Semaphore(workload.concurrency) if workload.rate is None else None

    async def send_one(request: PlannedRequest) -> Record:
        if free is None:
            due = start + (request.due or 0.0)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            return await _measure(client, request, due)
        async with free:
            return await _measure(client, request, time.monotonic())

    return await asyncio.gather(*(send_one(request) for request in planned))


async def _measure(client: AsyncClient, request: PlannedRequest, due: float) -> Record:
    record = Record(due, len(request.prompt))
    try:
        async with client.generate(
            token_ids=request.prompt, max_tokens=request.max_tokens, ignore_eos=True, temperature=0.0
        ) as chunks:
            async for chunk in chunks:
                record.add(time.monotonic(), len(chunk.token_ids))
    except HeadraceError as error:
        record.error = error.reason or error.code.name
    return record


@dataclass(frozen=True)
class ProcessMemory:
    """One process of the server. Bytes; `pss` shares what is mapped by several, `rss` counts it in each."""

    role: str
    pid: int
    rss: int
    pss: int


@dataclass(frozen=True)
class OwnServer:
    """A server that this process started."""

    target: str
    pid: int
    start_seconds: float  # from exec to the model being ready

    def memory(self) -> list[ProcessMemory]:
        """The front end and every process it has started."""
        front = psutil.Process(self.pid)
        found = []
        for process in (front, *front.children(recursive=True)):
            info = process.memory_full_info()
            role = "front" if process.pid == self.pid else _role(process.cmdline())
            found.append(ProcessMemory(role, process.pid, info.rss, getattr(info, "pss", 0)))
        return found


@contextmanager
def own_server(arguments: Sequence[str]) -> Iterator[OwnServer]:
    """Runs `headrace serve` on a free port until the block is left. Raises CommandError if it does not come up."""
    command = [sys.executable, "-m", "headrace.server.cli", "serve"]
    command += ["--port", "0", "--json", "--log-level", "warning", "--lame-duck", "0", *arguments]
    begin = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env={**os.environ, "NO_COLOR": "1"}
    )
    watchdog = _kill_after(process, _START_SECONDS)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        watchdog.cancel()
        if not line:
            raise CommandError(f"the server did not start (status {process.wait()})")
        yield OwnServer(json.loads(line)["target"], process.pid, time.monotonic() - begin)
    finally:
        watchdog.cancel()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _kill_after(process: subprocess.Popen[bytes], seconds: float) -> Timer:
    timer = Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _role(command: list[str]) -> str:
    module = next((part for part in command if part.startswith("headrace.")), "")
    return module.removeprefix("headrace.server.").removesuffix("_main") or "helper"
