"""Replicas on the counting engine of tests/server, whose steps take as long as they are told to: for claims about
queues and balancing, where the capacity must be known and the machine's own speed must not matter.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.mesh import fleet as fleets
from tests.mesh.claims import Stage
from tests.server import scripted_engine

_CHILD = Path(scripted_engine.__file__).with_name("serve_child.py")


@dataclass(frozen=True)
class Scripted:
    """Envoy's address, and the replicas' own."""

    envoy: fleets.Envoy
    ports: tuple[int, ...]


@asynccontextmanager
async def start(
    stage: Stage, count: int, *, step_seconds: float, adapt: fleets.Adapt | None = None, **settings: Any
) -> AsyncIterator[Scripted]:
    """So many replicas behind Envoy, all healthy. settings: of ServerConfig."""
    async with AsyncExitStack() as stack:
        ports = [await _replica(stack, stage, number, step_seconds, settings) for number in range(count)]
        envoy = fleets.Envoy(stage.folder, ports, adapt)
        stack.push_async_callback(envoy.stop)
        await envoy.start()

        async def is_healthy() -> bool:
            return len(await envoy.healthy_ports() & set(ports)) == count

        await fleets.until(is_healthy, f"{count} healthy replicas")
        yield Scripted(envoy, tuple(ports))


async def _replica(stack: AsyncExitStack, stage: Stage, number: int, step: float, settings: dict[str, Any]) -> int:
    command = [sys.executable, str(_CHILD), str(stage.tiny), json.dumps(settings)]
    command += scripted_engine.command(step_seconds=step)
    with open(stage.folder / f"scripted{number}.log", "ab") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=log)

    async def end() -> None:
        if process.returncode is None:
            process.kill()
        await process.wait()

    stack.push_async_callback(end)
    assert process.stdout is not None
    port = int(json.loads(await asyncio.wait_for(process.stdout.readline(), fleets.PATIENCE))["port"])
    await asyncio.wait_for(process.stdout.readline(), fleets.PATIENCE)  # it is ready
    return port
