"""SIGTERM and SIGINT: health first, what runs finishes, exit 0, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc

from tests.server import scripted_engine
from tests.server.support import PATIENCE, drained, failure, ids_of, tokens_request

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHILD = Path(__file__).with_name("serve_child.py")
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Child:
    """A server process."""

    process: asyncio.subprocess.Process
    port: int
    log: list[str] = field(default_factory=list)
    engine: int = 0

    async def wait_ready(self) -> None:
        assert self.process.stdout is not None
        self.engine = json.loads(await asyncio.wait_for(self.process.stdout.readline(), PATIENCE))["engine"]

    async def end(self) -> int:
        """Its exit status; fills `log`."""
        _, err = await asyncio.wait_for(self.process.communicate(), PATIENCE)
        self.log = err.decode().splitlines()
        return self.process.returncode or 0

    def check_clean(self) -> None:
        """No traceback, no engine left, the port free."""
        assert not [line for line in self.log if "Traceback" in line or "ERROR" in line], self.log
        assert not self.engine or not psutil.pid_exists(self.engine)


@asynccontextmanager
async def _child(model: Path, engine: Sequence[str], **settings: Any) -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(CHILD), str(model), json.dumps(settings), *engine),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE)
        assert line, (await process.communicate())[1].decode()
        yield Child(process, json.loads(line)["port"])
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_what_runs_finishes_and_nothing_new_begins(tiny_llama_gguf: Path, number: signal.Signals) -> None:
    engine = scripted_engine.command(step_seconds=0.01)
    async with (
        _child(tiny_llama_gguf, engine, lame_duck=0.3) as child,
        grpc.aio.insecure_channel(f"127.0.0.1:{child.port}") as channel,
    ):
        await child.wait_ready()
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        requests = [tokens_request([20 + index], max_tokens=120) for index in range(8)]
        calls = [asyncio.ensure_future(drained(stub.Generate(request))) for request in requests]
        idle = stub.Session()
        await idle.initial_metadata()
        await asyncio.sleep(0.1)
        child.process.send_signal(number)
        os.kill(child.engine, number)  # a terminal's Ctrl-C and some supervisors signal the whole group
        assert (await asyncio.wait_for(watch.read(), PATIENCE)).status == NOT_SERVING
        # Balancers need some time to notice: until then, calls are still taken.
        assert await drained(stub.Generate(tokens_request(max_tokens=2)))
        for index, call in enumerate(calls):
            assert ids_of(await asyncio.wait_for(call, PATIENCE)) == [_nth(20 + index, step) for step in range(1, 121)]
        failed = await failure(drained(idle))
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        late = await failure(drained(stub.Generate(tokens_request())))
        assert late.code == grpc.StatusCode.UNAVAILABLE
        assert await child.end() == 0
        child.check_clean()


def _nth(token_id: int, steps: int) -> int:
    for _ in range(steps):
        token_id = scripted_engine.following(token_id)
    return token_id


async def test_a_second_signal_does_not_wait(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.2)
    async with (
        _child(tiny_llama_gguf, engine, lame_duck=60, drain_deadline=60) as child,
        grpc.aio.insecure_channel(f"127.0.0.1:{child.port}") as channel,
    ):
        await child.wait_ready()
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        call = stub.Generate(tokens_request(max_tokens=500))
        await call.read()
        child.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.1)
        child.process.send_signal(signal.SIGTERM)
        assert (await failure(_read_all(call))).code == grpc.StatusCode.UNAVAILABLE
        assert await child.end() == 0
        child.check_clean()


async def _read_all(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_the_drain_deadline_ends_what_takes_longer(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.1)
    async with (
        _child(tiny_llama_gguf, engine, lame_duck=0, drain_deadline=0.3) as child,
        grpc.aio.insecure_channel(f"127.0.0.1:{child.port}") as channel,
    ):
        await child.wait_ready()
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        running = asyncio.ensure_future(failure(drained(stub.Generate(tokens_request(max_tokens=500)))))
        await asyncio.sleep(0.3)
        child.process.send_signal(signal.SIGTERM)
        assert (await running).code == grpc.StatusCode.UNAVAILABLE
        assert await child.end() == 0
        child.check_clean()


async def test_a_signal_while_it_loads_is_obeyed(tiny_llama_gguf: Path) -> None:
    async with _child(tiny_llama_gguf, scripted_engine.command(load_seconds=60.5), lame_duck=0) as child:
        await asyncio.sleep(0.3)
        child.process.send_signal(signal.SIGTERM)
        assert await child.end() == 0
        assert not [line for line in child.log if "Traceback" in line]
        assert not [process for process in psutil.process_iter() if _is_the_loading_engine(process)]


def _is_the_loading_engine(process: psutil.Process) -> bool:
    try:
        return "60.5" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


async def test_a_model_that_cannot_be_served_ends_the_process_with_1(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF")
    async with _child(path, scripted_engine.command(), lame_duck=0) as child:
        assert await child.end() == 1
        assert any("bad.gguf" in line for line in child.log)


async def test_request_lines_are_one_json_object_each_and_cannot_be_forged(tiny_llama_gguf: Path) -> None:
    async with (
        _child(tiny_llama_gguf, scripted_engine.command(), lame_duck=0, log_format="json") as child,
        grpc.aio.insecure_channel(f"127.0.0.1:{child.port}") as channel,
    ):
        await child.wait_ready()
        stub: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        request = tokens_request(max_tokens=2)
        request.request_label = 'x" level="ERROR'
        await drained(stub.Generate(request))
        await stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="CANARY")))
        child.process.send_signal(signal.SIGTERM)
        assert await child.end() == 0
        lines = [json.loads(line) for line in child.log if line.startswith("{")]
        requests = [line for line in lines if line["logger"] == "headrace.request"]
        assert [line["method"].rsplit("/")[-1] for line in requests] == ["Generate", "Tokenize"]
        assert requests[0]["label"] == request.request_label
        assert requests[0]["level"] == "info"
        assert len({line["request_id"] for line in requests}) == 2
        assert (requests[0]["prompt_tokens"], requests[0]["generated_tokens"]) == (3, 2)
        parts = [requests[0][f"{part}_seconds"] for part in ("queue", "prefill", "decode")]
        assert 0 < sum(parts) <= requests[0]["seconds"]
        assert "CANARY" not in "".join(child.log)
