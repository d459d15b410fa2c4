"""The engine is another process: what clients see when it dies, hangs or cannot load, and that it never outlives us."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.server.app import ServerFailedError, start_server
from headrace.server.config import ServerConfig
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import models_pb2, models_pb2_grpc

from tests.server import scripted_engine
from tests.server.support import PATIENCE, Bench, bench, drained, failure, ids_of, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def _watch(server: Bench, seen: list[int]) -> None:
    stub = health_pb2_grpc.HealthStub(server.channel)
    async for response in stub.Watch(health_pb2.HealthCheckRequest(service="tiny")):
        seen.append(response.status)  # noqa: PERF401  (wanted as it comes)


def _engine_pid(server: Bench) -> int:
    pid = server.running.host.supervisor.pid
    assert pid is not None
    return pid


@pytest.mark.parametrize("how", ["kill", "poison"])
async def test_when_the_engine_dies_streams_are_told_and_a_new_one_serves(tiny_llama_gguf: Path, how: str) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.01)) as server:
        seen: list[int] = []
        watching = asyncio.ensure_future(_watch(server, seen))
        await until(lambda: seen == [SERVING])
        calls = [asyncio.ensure_future(failure(drained(server.stub.Generate(_long())))) for _ in range(8)]
        whole = server.stub.Complete(pb.CompleteRequest(request=_long()))
        calls.append(asyncio.ensure_future(failure(whole)))
        await until(lambda: server.running.admission.stats().num_live == 9)
        first = _engine_pid(server)
        if how == "kill":
            os.kill(first, signal.SIGKILL)
        else:
            poison = server.stub.Generate(tokens_request([scripted_engine.CRASH]))
            calls.append(asyncio.ensure_future(failure(drained(poison))))
        for failed in await asyncio.gather(*calls):
            assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTED")
        await until(lambda: seen == [SERVING, NOT_SERVING, SERVING])
        assert _engine_pid(server) != first
        assert not psutil.pid_exists(first)
        assert await drained(server.stub.Generate(tokens_request()))
        assert server.running.host.supervisor.num_restarts == 1
        watching.cancel()
        stats = await server.idle_stats()
        assert stats.num_free_blocks == stats.num_total_blocks


def _long() -> pb.GenerateRequest:
    return tokens_request(max_tokens=400, temperature=1.0)


async def test_a_session_survives_the_engine(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.01)) as server:
        call = server.stub.Session()
        for name in ("a", "b"):
            await call.write(pb.SessionRequest(start=pb.SessionStart(generation_id=name, request=_long())))
        for _ in range(4):
            await call.read()
        os.kill(_engine_pid(server), signal.SIGKILL)
        lost = set()
        while len(lost) < 2:
            event = await call.read()
            if event.HasField("error"):
                assert (event.error.code, event.error.reason) == (14, "ENGINE_RESTARTED")
                lost.add(event.error.generation_id)
        assert lost == {"a", "b"}
        await until(lambda: server.running.host.state == "ready")
        start = pb.SessionStart(generation_id="a", request=tokens_request(max_tokens=2))
        await call.write(pb.SessionRequest(start=start))
        await call.done_writing()
        events = [event.WhichOneof("event") for event in await _rest(call)]
        assert events[0] == "started"
        assert set(events[1:]) == {"chunk"}


async def _rest(call: Any) -> list[pb.SessionResponse]:
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event)
    return events


async def test_while_no_engine_answers_requests_are_refused_for_others_to_take(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(load_seconds=0.5)) as server:
        os.kill(_engine_pid(server), signal.SIGKILL)
        await until(lambda: server.running.host.state == "loading")
        for call in (
            drained(server.stub.Generate(tokens_request())),
            drained(server.stub.Session()),
            server.stub.Score(pb.ScoreRequest(prompt=pb.Prompt(text="a b c"))),
        ):
            failed = await failure(call)
            assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
        await until(lambda: server.running.host.state == "ready")
        assert await drained(server.stub.Generate(tokens_request()))


async def test_an_engine_that_hangs_is_killed_and_replaced(tiny_llama_gguf: Path) -> None:
    """It is stopped in the middle of a step: alive for the kernel, silent on the socket."""
    async with bench(tiny_llama_gguf, scripted_engine.command(), hang_timeout=0.5) as server:
        first = _engine_pid(server)
        failed = await failure(drained(server.stub.Generate(tokens_request([scripted_engine.HANG]))))
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_RESTARTED")
        await until(lambda: server.running.host.state == "ready")
        assert not psutil.pid_exists(first)
        assert await drained(server.stub.Generate(tokens_request()))


async def test_a_slow_step_is_not_taken_for_a_hang(tiny_llama_gguf: Path) -> None:
    async with bench(tiny_llama_gguf, scripted_engine.command(step_seconds=0.3), hang_timeout=0.6) as server:
        assert len(ids_of(await drained(server.stub.Generate(tokens_request(max_tokens=5))))) == 5
        assert server.running.host.supervisor.num_restarts == 0


async def test_an_engine_that_keeps_dying_is_given_up(tiny_llama_gguf: Path) -> None:
    config = ServerConfig(model=str(tiny_llama_gguf), model_name="tiny", port=0, max_restarts_per_minute=2)
    command = (sys.executable, "-c", "raise SystemExit(9)")
    async with start_server(config, engine_command=command) as running:
        with pytest.raises(ServerFailedError):
            await asyncio.wait_for(running.wait_ready(), PATIENCE)
        assert running.host.supervisor.num_restarts == 2
        await _check_failed(running.address)


async def test_a_model_that_cannot_be_read_fails_by_name_and_clients_learn_no_path(tmp_path: Path) -> None:
    path = tmp_path / "CANARY.gguf"
    path.write_bytes(b"GGUF" + bytes(40))
    config = ServerConfig(model=str(path), model_name="tiny", port=0)
    async with start_server(config) as running:
        with pytest.raises(ServerFailedError, match=r"CANARY\.gguf"):  # the operator does
            await asyncio.wait_for(running.wait_ready(), PATIENCE)
        await _check_failed(running.address)


async def test_without_a_back_end_the_operator_is_told_what_to_install(
    tiny_llama_gguf: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_NATIVE_LIBRARY", "/absent.so")
    script = "import sys; sys.modules['torch'] = None; from headrace.server.engine_main import main; main()"
    config = ServerConfig(model=str(tiny_llama_gguf), model_name="tiny", port=0)
    async with start_server(config, engine_command=(sys.executable, "-c", script)) as running:
        with pytest.raises(ServerFailedError, match=r"absent\.so.*torch reference: pip install"):
            await asyncio.wait_for(running.wait_ready(), PATIENCE)
        await _check_failed(running.address)
    assert "Traceback" not in capfd.readouterr().err


async def _check_failed(address: str) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        generate = channel.unary_stream("/headrace.v1.InferenceService/Generate")
        failed = await failure(drained(generate(tokens_request().SerializeToString())))
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_FAILED")
        assert "CANARY" not in repr(failed)
        models: Any = models_pb2_grpc.ModelServiceStub(channel)
        response = await models.GetModel(models_pb2.GetModelRequest())
        assert response.model.state == models_pb2.MODEL_STATE_FAILED
        assert "CANARY" not in str(response)
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert (await health.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


async def test_an_engine_of_another_mind_is_hung_up_on(tiny_llama_gguf: Path) -> None:
    """Bytes that are not in the schema end the connection, never the front end."""
    script = (
        "import socket,sys,time; s=socket.socket(fileno=int(sys.argv[2])); s.sendall(b'\\0\\0\\0\\x02zz'); s.recv(9)"
    )
    config = ServerConfig(model=str(tiny_llama_gguf), model_name="tiny", port=0, max_restarts_per_minute=0)
    async with start_server(config, engine_command=(sys.executable, "-c", script)) as running:
        with pytest.raises(ServerFailedError):
            await asyncio.wait_for(running.wait_ready(), PATIENCE)


async def test_loading_is_told_while_it_goes_on(tiny_llama_gguf: Path) -> None:
    config = ServerConfig(model=str(tiny_llama_gguf), model_name="tiny", port=0)
    async with (
        start_server(config, engine_command=scripted_engine.command(load_seconds=0.5)) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        models: Any = models_pb2_grpc.ModelServiceStub(channel)
        seen: list[models_pb2.Model] = []

        async def is_ready() -> bool:
            seen.extend((await models.ListModels(models_pb2.ListModelsRequest())).models)
            return seen[-1].state == models_pb2.MODEL_STATE_READY

        await until(is_ready)
        assert seen[0].state == models_pb2.MODEL_STATE_LOADING
        assert any(abs(model.load_progress - 0.5) < 1e-6 for model in seen)
        assert seen[0].architecture == ""
        assert (seen[-1].load_progress, seen[-1].architecture) == (1.0, "llama")


async def test_the_engine_goes_when_its_front_end_is_killed(tiny_llama_gguf: Path) -> None:
    """Neither a signal handler nor a `finally` runs in a process that is killed: the kernel has to do it."""
    script = (
        "import asyncio, grpc, sys\n"
        "from headrace.v1.inference_pb2 import GenerateRequest, Prompt\n"
        "from headrace.v1.inference_pb2_grpc import InferenceServiceStub\n"
        "from headrace.server.app import start_server\n"
        "from headrace.server.config import ServerConfig\n"
        "async def main():\n"
        "    config = ServerConfig(model=sys.argv[1], port=0)\n"
        "    async with start_server(config, engine_command=sys.argv[2:]) as running:\n"
        "        await running.wait_ready()\n"
        "        async with grpc.aio.insecure_channel(running.address) as channel:\n"
        "            call = InferenceServiceStub(channel).Generate(GenerateRequest(prompt=Prompt(text='x')))\n"
        "            await call.initial_metadata()\n"
        "            print(running.host.supervisor.pid, flush=True)\n"
        "            await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    command = scripted_engine.command(step_seconds=60.0)  # in a step it does not look at its socket
    front = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", script, str(tiny_llama_gguf), *command), stdout=asyncio.subprocess.PIPE
    )
    assert front.stdout is not None
    engine = int(await asyncio.wait_for(front.stdout.readline(), PATIENCE))
    assert psutil.pid_exists(engine)
    front.kill()
    await front.wait()
    await until(lambda: not psutil.pid_exists(engine) or psutil.Process(engine).status() == psutil.STATUS_ZOMBIE)
    front._transport.close()  # type: ignore[attr-defined]
