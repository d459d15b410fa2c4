"""Envoy in front of two replicas, with the configuration of deploy/envoy: streams, health checks, retries, drain."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

from tests.server import scripted_engine
from tests.server.support import PATIENCE, Bench, bench, drained, failure, ids_of, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

ENVOY = Path(sys.executable).with_name("envoy")
CONFIG = Path(__file__).parents[2] / "deploy" / "envoy" / "envoy.yaml"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _config_for(path: Path, *backends: int) -> tuple[Path, int, int]:
    """deploy/envoy/envoy.yaml on other ports: (file, admin port, listener port)."""
    admin, listener = _free_port(), _free_port()
    text = CONFIG.read_text()
    ports = {9901: admin, 50050: listener, **dict(zip((50051, 50052), backends, strict=True))}
    for old, new in ports.items():
        assert text.count(f"port_value: {old}}}") == 1
        text = text.replace(f"port_value: {old}}}", f"port_value: new {new}}}")
    path.write_text(text.replace("port_value: new ", "port_value: "))
    return path, admin, listener


@dataclass(frozen=True)
class Mesh:
    """Envoy, its two replicas and a client of it."""

    replicas: tuple[Bench, Bench]
    stub: Any
    channel: grpc.aio.Channel
    admin: int

    async def clusters(self) -> str:
        """Envoy's own view of its hosts."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.admin)
        writer.write(b"GET /clusters HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return text

    async def is_healthy(self, count: int) -> bool:
        try:
            return (await self.clusters()).count("::health_flags::healthy") == count
        except OSError:
            return False


@asynccontextmanager
async def _mesh(model: Path, tmp_path: Path, step_seconds: float = 0.0, **settings: Any) -> AsyncIterator[Mesh]:
    if not ENVOY.exists():
        pytest.fail("envoy is not in the virtual environment; run `make setup`", pytrace=False)
    async with AsyncExitStack() as stack:
        command = scripted_engine.command(step_seconds=step_seconds)
        first = await stack.enter_async_context(bench(model, command, **settings))
        second = await stack.enter_async_context(bench(model, command, **settings))
        config, admin, listener = _config_for(tmp_path / "envoy.yaml", first.running.port, second.running.port)
        options = ("--concurrency", "1", "--disable-hot-restart", "-l", "error")
        envoy = await asyncio.create_subprocess_exec(str(ENVOY), "-c", str(config), *options)
        try:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{listener}"))
            mesh = Mesh((first, second), inference_pb2_grpc.InferenceServiceStub(channel), channel, admin)
            await until(lambda: mesh.is_healthy(2))
            yield mesh
        finally:
            envoy.terminate()
            await envoy.wait()


async def test_the_configuration_is_valid() -> None:
    process = await asyncio.create_subprocess_exec(
        *(str(ENVOY), "--mode", "validate", "-c", str(CONFIG), "-l", "error"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 0, out.decode()


async def test_streams_sessions_and_errors_pass_through(tiny_llama_gguf: Path, tmp_path: Path) -> None:
    async with _mesh(tiny_llama_gguf, tmp_path) as mesh:
        responses = await drained(mesh.stub.Generate(tokens_request([20], max_tokens=100)))
        assert ids_of(responses) == list(range(21, 121))
        call = mesh.stub.Session()
        await call.write(pb.SessionRequest(ping=pb.SessionPing(nonce=3)))
        assert (await call.read()).pong.nonce == 3
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        failed = await failure(drained(mesh.stub.Generate(tokens_request(top_p=9.0))))
        assert (failed.reason, failed.fields) == ("INVALID_REQUEST", ("sampling.top_p",))
        # Both replicas get their share.
        await asyncio.gather(*(drained(mesh.stub.Generate(tokens_request(max_tokens=2))) for _ in range(40)))
        assert all(replica.running.admission.stats().num_created > 5 for replica in mesh.replicas)


async def test_a_cancelled_call_stops_in_the_engine_behind(tiny_llama_gguf: Path, tmp_path: Path) -> None:
    async with _mesh(tiny_llama_gguf, tmp_path, step_seconds=0.02) as mesh:
        call = mesh.stub.Generate(tokens_request(max_tokens=400))
        await call.read()
        call.cancel()
        for replica in mesh.replicas:
            assert (await replica.idle_stats()).num_steps < 200


async def test_what_one_replica_refuses_the_other_takes(tiny_llama_gguf: Path, tmp_path: Path) -> None:
    """Refusals come before initial metadata, so Envoy may try elsewhere; and a full server is not ejected."""
    async with _mesh(tiny_llama_gguf, tmp_path, step_seconds=0.02, max_live_sequences=2) as mesh:
        direct = [mesh.replicas[0].stub.Generate(tokens_request(max_tokens=400)) for _ in range(2)]
        for call in direct:
            await call.read()
        for _ in range(10):
            assert await drained(mesh.stub.Generate(tokens_request(max_tokens=1)))
        assert mesh.replicas[0].running.admission.stats().num_refused > 0
        assert await mesh.is_healthy(2)
        for call in direct:
            call.cancel()


async def test_a_draining_replica_gets_no_new_calls_and_finishes_its_own(tiny_llama_gguf: Path, tmp_path: Path) -> None:
    async with _mesh(tiny_llama_gguf, tmp_path, step_seconds=0.02, lame_duck=2.0) as mesh:
        request = tokens_request([20], max_tokens=180)
        calls = [asyncio.ensure_future(drained(mesh.stub.Generate(request))) for _ in range(8)]
        leaving, staying = mesh.replicas
        await until(lambda: all(r.running.admission.stats().num_live > 0 for r in mesh.replicas))
        draining = asyncio.ensure_future(leaving.running.drain())
        await until(lambda: mesh.is_healthy(1))
        before = leaving.running.admission.stats().num_created
        for _ in range(10):
            assert await drained(mesh.stub.Generate(tokens_request(max_tokens=1)))
        assert leaving.running.admission.stats().num_created == before
        for call in calls:
            assert ids_of(await asyncio.wait_for(call, PATIENCE)) == list(range(21, 201))
        await asyncio.wait_for(draining, PATIENCE)
        assert staying.running.host.state == "ready"
