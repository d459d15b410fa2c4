"""Health (Check, Watch, List), ModelService, reflection's list and channelz: what machines ask a server."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from headrace.server import descriptors
from headrace.v1 import models_pb2

from tests.server import scripted_engine
from tests.server.support import PATIENCE, Bench, bench, drained, failure, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

NAMES = {
    "",
    "tiny",
    "headrace.v1.InferenceService",
    "headrace.v1.ModelService",
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "xds.service.orca.v3.OpenRcaService",
}
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def _health(server: Bench) -> Any:
    return health_pb2_grpc.HealthStub(server.channel)


async def test_check_knows_the_server_its_services_and_its_model(counting: Bench) -> None:
    for name in NAMES:
        response = await _health(counting).Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == SERVING, name
    failed = await failure(_health(counting).Check(health_pb2.HealthCheckRequest(service="tin")))
    assert failed.code == grpc.StatusCode.NOT_FOUND


async def test_list_has_all_names(counting: Bench) -> None:
    pool = descriptors.build_pool()
    from google.protobuf.message_factory import GetMessageClass

    response_class: Any = GetMessageClass(pool.FindMessageTypeByName("grpc.health.v1.HealthListResponse"))
    raw = await counting.channel.unary_unary("/grpc.health.v1.Health/List")(b"")
    statuses = response_class.FromString(raw).statuses
    assert {name: entry.status for name, entry in statuses.items()} == dict.fromkeys([*NAMES, "liveness"], SERVING)


async def test_watch_of_an_unknown_name_says_so_and_stays(counting: Bench) -> None:
    call = _health(counting).Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    reading = asyncio.ensure_future(call.read())
    await asyncio.sleep(0.05)
    assert not reading.done()
    reading.cancel()
    call.cancel()


async def test_watch_flips_on_load_and_on_stop(tiny_llama_gguf: Path) -> None:
    from headrace.server.app import start_server
    from headrace.server.config import ServerConfig

    config = ServerConfig(model=str(tiny_llama_gguf), model_name="tiny", port=0, lame_duck=0.2)
    engine = scripted_engine.command(load_seconds=0.3)
    async with (
        start_server(config, engine_command=engine) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        seen: dict[str, list[int]] = {name: [] for name in NAMES}

        async def watch(name: str) -> None:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            async for response in stub.Watch(health_pb2.HealthCheckRequest(service=name)):
                seen[name].append(response.status)

        watching = [asyncio.ensure_future(failure(watch(name))) for name in NAMES]
        await until(lambda: all(statuses == [NOT_SERVING, SERVING] for statuses in seen.values()))
        # Nothing runs, so the drain is over as soon as the lame-duck time is; open watches do not hold it up.
        await asyncio.wait_for(running.drain(), 10)
        for failed in await asyncio.wait_for(asyncio.gather(*watching), PATIENCE):
            assert failed.code == grpc.StatusCode.UNAVAILABLE
        assert all(statuses == [NOT_SERVING, SERVING, NOT_SERVING] for statuses in seen.values())


async def test_liveness_says_nothing_about_the_model(tiny_llama_gguf: Path) -> None:
    from headrace.server.app import start_server
    from headrace.server.config import ServerConfig

    config = ServerConfig(model=str(tiny_llama_gguf), model_name="tiny", port=0)
    engine = scripted_engine.command(load_seconds=20)
    async with (
        start_server(config, engine_command=engine) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        assert (await stub.Check(health_pb2.HealthCheckRequest(service="liveness"))).status == SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == NOT_SERVING


async def test_an_engine_without_progress_is_not_serving_until_it_goes_on(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.01)
    async with bench(tiny_llama_gguf, engine, progress_timeout=0.3, hang_timeout=60.0) as server:
        watch = _health(server).Watch(health_pb2.HealthCheckRequest(service="tiny"))
        assert (await watch.read()).status == SERVING
        call = server.stub.Generate(tokens_request(max_tokens=300))
        await call.read()
        pid = server.running.host.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        try:
            assert (await asyncio.wait_for(watch.read(), PATIENCE)).status == NOT_SERVING
        finally:
            os.kill(pid, signal.SIGCONT)
        assert (await asyncio.wait_for(watch.read(), PATIENCE)).status == SERVING
        while await call.read() is not grpc.aio.EOF:  # it was only slow: nothing is lost
            pass
        assert await call.code() is grpc.StatusCode.OK
        watch.cancel()
        await server.idle_stats()


async def test_health_is_not_subject_to_admission(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, max_live_sequences=1) as server:
        call = server.stub.Generate(tokens_request(max_tokens=300))
        await call.read()
        for _ in range(20):
            failed = await failure(drained(server.stub.Generate(tokens_request())))
            assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED
            response = await _health(server).Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
            assert response.status == SERVING
        call.cancel()
        await server.idle_stats()


async def test_models_are_described_as_their_files_say(tiny: Bench, tiny_llama_gguf: Path) -> None:
    (model,) = (await tiny.models.ListModels(models_pb2.ListModelsRequest())).models
    assert model == (await tiny.models.GetModel(models_pb2.GetModelRequest(model="tiny"))).model
    assert (model.name, model.state, model.load_progress) == ("tiny", models_pb2.MODEL_STATE_READY, 1.0)
    assert (model.architecture, model.quantization) == ("llama", "F32")
    assert model.backend.startswith("native-" if tiny.running.config.backend == "auto" else "triton-")
    assert (model.context_length, model.vocab_size) == (512, 384)
    assert model.file_bytes == tiny_llama_gguf.stat().st_size
    assert model.parameters * 4 < model.file_bytes < model.parameters * 4 + 100_000
    assert 2 in model.eos_token_ids
    assert "<|im_start|>" in model.chat_template


async def test_the_servers_context_is_the_lesser_of_the_models_and_its_own(tiny_llama_gguf: Path) -> None:
    for settings in ({"max_model_len": 96}, {"num_blocks": 7}):  # block 0 holds nothing
        async with bench(tiny_llama_gguf, scripted_engine.command(), **settings) as server:
            model = (await server.models.GetModel(models_pb2.GetModelRequest())).model
            assert model.context_length == 96
            failed = await failure(drained(server.stub.Generate(tokens_request([9] * 90, max_tokens=7))))
            assert failed.reason == "PROMPT_TOO_LONG"
            assert await drained(server.stub.Generate(tokens_request([9] * 90, max_tokens=6)))


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_describes_every_service_with_all_its_methods(counting: Bench, version: str) -> None:
    from google.protobuf import descriptor_pb2

    method = counting.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {service.name for service in (await call.read()).list_services_response.service}
    assert listed == NAMES - {"", "tiny"}
    for name in listed:
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=name))
        raw_files = (await call.read()).file_descriptor_response.file_descriptor_proto
        files = [descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in raw_files]
        (service,) = [s for file in files for s in file.service if f"{file.package}.{s.name}" == name]
        if name == "grpc.health.v1.Health":
            assert {m.name for m in service.method} == {"Check", "Watch", "List"}
        if name == "headrace.v1.InferenceService":
            assert len(service.method) == 8
    await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing"))
    assert (await call.read()).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


async def test_reflection_and_channelz_are_there_when_asked_for_and_only_then(tiny_llama_gguf: Path) -> None:
    settings = {"enable_channelz": True, "enable_reflection": False}
    async with bench(tiny_llama_gguf, scripted_engine.command(), **settings) as server:
        stub: Any = channelz_pb2_grpc.ChannelzStub(server.channel)
        response = await stub.GetServers(channelz_pb2.GetServersRequest(start_server_id=0))
        assert response.server
        call = server.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")()
        assert (await failure(drained(call))).code == grpc.StatusCode.UNIMPLEMENTED
    async with bench(tiny_llama_gguf, scripted_engine.command()) as server:
        stub = channelz_pb2_grpc.ChannelzStub(server.channel)
        failed = await failure(stub.GetServers(channelz_pb2.GetServersRequest(start_server_id=0)))
        assert failed.code == grpc.StatusCode.UNIMPLEMENTED
