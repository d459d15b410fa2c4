"""A fleet for the claims of `make mesh`: replicas of `headrace serve` in processes of their own, a real Envoy in front.

Envoy runs the configuration of deploy/envoy/envoy.yaml with other ports and hosts, so that what is shipped is what is
shown; a claim changes it through `adapt`. All ports are on 127.0.0.1. A replica keeps its port over restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ENVOY = Path(sys.executable).with_name("envoy")
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"
PATIENCE = 60.0  # seconds for what should take one; only a failure waits that long
MODEL_NAME = "mesh"
# Below the range from which the kernel takes the ports of outgoing connections: while a replica is dead, Envoy's own
# attempts to reach it must not be given its port.
_PORTS = range(15000, 32000)

Adapt = Callable[[dict[str, Any]], None]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


async def until(condition: Callable[[], bool | Awaitable[bool]], what: str, seconds: float = PATIENCE) -> None:
    """Wait until a condition holds. Raises TimeoutError that says `what` was awaited."""
    end = time.monotonic() + seconds
    while True:
        holds = condition()
        if await holds if isinstance(holds, Awaitable) else holds:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        await asyncio.sleep(0.02)


class Replica:
    """One `headrace serve`. `start` it, then `kill`, `terminate` or `stop` it; it can be started again."""

    def __init__(
        self, number: int, model: Path, folder: Path, options: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.number = number
        self.port = free_port()
        self.num_starts = 0
        self._model = model
        self._log = folder / f"replica{number}.log"
        self._options = tuple(options)
        self._environment = {**os.environ, **environment}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def target(self) -> str:
        """For a channel that goes around Envoy."""
        return f"127.0.0.1:{self.port}"

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The front end's; the engine's is its child."""
        assert self._process is not None, "it was never started"
        return self._process

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Start it and wait until its model answers. Raises RuntimeError where it ends instead; see its log."""
        assert not self.is_running
        self.num_starts += 1
        command = [sys.executable, "-m", "headrace.server.cli", "serve", "--json", "--name", MODEL_NAME]
        command += ["--model", str(self._model), "--port", str(self.port), "--threads", "1", *self._options]
        with open(self._log, "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env=self._environment,
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), PATIENCE)
        if not line:
            raise RuntimeError(f"replica {self.number} ended with status {await self._process.wait()}")
        assert json.loads(line)["target"] == self.target

    async def kill(self) -> None:
        """SIGKILL, as a crash: nothing is said to anybody. Its engine dies with it."""
        self.process.kill()
        await self.process.wait()

    def terminate(self) -> None:
        """SIGTERM: it drains. `wait` for its end."""
        self.process.terminate()

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    def engine_pid(self) -> int:
        """The engine process. Raises LookupError while there is none."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in map(int, children):
            if b"engine_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise LookupError(f"replica {self.number} has no engine")

    def kill_engine(self) -> None:
        """SIGKILL to the engine alone; the front end starts another."""
        os.kill(self.engine_pid(), signal.SIGKILL)

    async def stop(self) -> None:
        """End it without waiting for what it does."""
        if self.is_running:
            await self.kill()


class Envoy:
    """The Envoy process. target: where clients connect."""

    def __init__(self, folder: Path, ports: Sequence[int], adapt: Adapt | None) -> None:
        self.port, self.admin_port = free_port(), free_port()
        self.target = f"127.0.0.1:{self.port}"
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None
        self._config = envoy_config(self.port, self.admin_port, ports)
        if adapt is not None:
            adapt(self._config)

    async def start(self) -> None:
        """Start it; returns when its admin port answers. Raises RuntimeError where it refuses its configuration."""
        if not ENVOY.exists():
            raise RuntimeError("envoy is not in the virtual environment; run `make setup`")
        path = self._folder / "envoy.json"
        path.write_text(json.dumps(self._config, indent=1))
        options = ("--concurrency", "1", "--disable-hot-restart", "-l", "warning")
        with open(self._folder / "envoy.log", "ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(ENVOY), "-c", str(path), *options, stdout=log, stderr=log
            )
        process = self._process

        async def answers() -> bool:
            if process.returncode is not None:
                raise RuntimeError(f"envoy ended with status {process.returncode}; see {self._folder / 'envoy.log'}")
            with contextlib.suppress(OSError):
                return bool(await self.admin("/ready"))
            return False

        await until(answers, "envoy's admin port")

    async def stop(self) -> None:
        """End it."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def admin(self, path: str) -> str:
        """The body of a page of the admin port, e.g. "/clusters". Raises OSError."""
        url = f"http://127.0.0.1:{self.admin_port}{path}"

        def fetch() -> str:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                return str(answer.read().decode())

        return await asyncio.to_thread(fetch)

    async def stats(self, pattern: str = "") -> dict[str, int]:
        """Counters and gauges whose names match a regular expression."""
        text = await self.admin(f"/stats?format=json&filter={pattern}")
        return {s["name"]: s["value"] for s in json.loads(text)["stats"] if isinstance(s.get("value"), int)}

    async def healthy_ports(self) -> set[int]:
        """Ports of the replicas that get new calls."""
        text = await self.admin("/clusters")
        return {
            int(line.split("::")[1].rpartition(":")[2])
            for line in text.splitlines()
            if line.endswith("::health_flags::healthy")
        }


@dataclass(frozen=True)
class Fleet:
    """Replicas and the Envoy in front of them."""

    replicas: tuple[Replica, ...]
    envoy: Envoy

    @property
    def target(self) -> str:
        """Envoy's listener."""
        return self.envoy.target

    async def wait_healthy(self, count: int | None = None, seconds: float = PATIENCE) -> None:
        """Until Envoy finds so many replicas healthy (all that run, by default)."""
        wanted = sum(replica.is_running for replica in self.replicas) if count is None else count
        ours = {replica.port for replica in self.replicas}

        async def is_so() -> bool:
            return len(await self.envoy.healthy_ports() & ours) == wanted

        await until(is_so, f"{wanted} healthy replicas", seconds)

    async def restart(self, replica: Replica) -> None:
        """Start a replica that ended, and wait until Envoy sends it calls."""
        await replica.start()

        async def is_so() -> bool:
            return replica.port in await self.envoy.healthy_ports()

        await until(is_so, f"replica {replica.number} healthy again")


@asynccontextmanager
async def start(
    num_replicas: int,
    model: Path,
    folder: Path,
    options: Sequence[str] = (),
    *,
    adapt: Adapt | None = None,
    environment: Mapping[str, str] | None = None,
) -> AsyncIterator[Fleet]:
    """A fleet, ready and healthy; everything is killed at the end. adapt: changes Envoy's configuration (the parsed
    deploy/envoy/envoy.yaml, its ports and hosts set) before Envoy starts. environment: more variables for the
    replicas."""
    folder.mkdir(parents=True, exist_ok=True)
    replicas = tuple(Replica(number, model, folder, options, environment or {}) for number in range(num_replicas))
    async with AsyncExitStack() as stack:
        for replica in replicas:
            stack.push_async_callback(replica.stop)
        await asyncio.gather(*(replica.start() for replica in replicas))
        envoy = Envoy(folder, [replica.port for replica in replicas], adapt)
        stack.push_async_callback(envoy.stop)
        await envoy.start()
        fleet = Fleet(replicas, envoy)
        await fleet.wait_healthy()
        yield fleet


def envoy_config(port: int, admin_port: int, backends: Sequence[int]) -> dict[str, Any]:
    """deploy/envoy/envoy.yaml on other ports, with these backends."""
    config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
    config["admin"]["address"]["socket_address"]["port_value"] = admin_port
    (listener,) = config["static_resources"]["listeners"]
    listener["address"]["socket_address"]["port_value"] = port
    cluster(config)["load_assignment"]["endpoints"] = [{"lb_endpoints": [endpoint(backend) for backend in backends]}]
    return config


def endpoint(port: int) -> dict[str, Any]:
    """A replica as Envoy writes it."""
    return {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}


def cluster(config: dict[str, Any]) -> dict[str, Any]:
    """The cluster of replicas in a configuration, for `adapt`."""
    return next(c for c in config["static_resources"]["clusters"] if c["name"] == "headrace")


def http_manager(config: dict[str, Any]) -> dict[str, Any]:
    """The listener's HTTP connection manager, for `adapt`: routes, filters, access log."""
    (listener,) = config["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    manager: dict[str, Any] = chain["filters"][0]["typed_config"]
    return manager
