"""What a client is told when things go wrong: exact status, reason and details; and what it is never told."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from headrace.server import errors
from headrace.server.model_host import ModelHost
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import models_pb2

from tests.server import scripted_engine
from tests.server.support import Bench, bench, chat_prompt, drained, failure, tokens_request, until

pytestmark = pytest.mark.asyncio(loop_scope="session")

INFERENCE = "/headrace.v1.InferenceService/"
SECRET = "CANARY of /some/path at 0x7f00deadbeef"
GARBAGE = (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x00", b"\x0a\x05abc")


async def test_the_catalogue_is_sound() -> None:
    """One row per reason; no status that meshes punish a healthy host for, or that gRPC uses for what nobody caught."""
    reasons = [kind.reason for kind in errors.CATALOGUE]
    assert len(set(reasons)) == len(reasons) > 20
    for kind in errors.CATALOGUE:
        assert kind.reason == kind.reason.upper()
        assert kind.message.endswith(".")
        assert kind.code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.OK)


@pytest.mark.parametrize("method", ["Generate", "Complete", "Tokenize", "Detokenize", "Score"])
async def test_malformed_bytes_are_an_invalid_argument(counting: Bench, method: str) -> None:
    for raw in GARBAGE:
        if method == "Generate":
            call = drained(counting.channel.unary_stream(INFERENCE + method)(raw))
        else:
            call = counting.channel.unary_unary(INFERENCE + method)(raw)
        failed = await failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
        assert failed.message == "The request is not a valid protobuf message."


async def test_invalid_utf8_in_a_string_is_malformed(counting: Bench) -> None:
    raw = tokens_request().SerializeToString() + b"\x22\x02\xc3\x28"  # request_label
    failed = await failure(drained(counting.channel.unary_stream(INFERENCE + "Generate")(raw)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")


def _naming(model: str) -> list[tuple[str, Message]]:
    prompt = pb.Prompt(text="x y")
    return [
        ("Generate", pb.GenerateRequest(model=model, prompt=prompt)),
        ("Complete", pb.CompleteRequest(request=pb.GenerateRequest(model=model, prompt=prompt))),
        ("Tokenize", pb.TokenizeRequest(model=model, prompt=prompt)),
        ("Detokenize", pb.DetokenizeRequest(model=model, token_ids=[5])),
        ("Score", pb.ScoreRequest(model=model, prompt=prompt)),
        ("GetModel", models_pb2.GetModelRequest(model=model)),
    ]


async def _call(server: Bench, method: str, request: Message) -> Any:
    stub = server.models if method.endswith(("Model", "Models")) else server.stub
    call = getattr(stub, method)(request)
    return await (drained(call) if method == "Generate" else call)


async def test_an_unknown_model_is_not_found_by_every_method(counting: Bench) -> None:
    for name in ("other", "tin", "tiny ", "TINY", "../tiny", "x" * 100_000):
        for method, request in _naming(name):
            failed = await failure(_call(counting, method, request))
            assert (failed.code, failed.reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")
            assert len(failed.message) < 100  # names are not repeated


async def test_an_unknown_method_is_unimplemented(counting: Bench) -> None:
    failed = await failure(counting.channel.unary_unary(INFERENCE + "Nothing")(b""))
    assert failed.code == grpc.StatusCode.UNIMPLEMENTED


async def test_too_large_a_message_is_refused_by_grpc_itself(counting: Bench) -> None:
    failed = await failure(counting.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="x" * (5 << 20)))))
    assert failed.code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_nan_is_charged_to_its_own_sequence(counting: Bench) -> None:
    innocent = asyncio.ensure_future(drained(counting.stub.Generate(tokens_request([50], max_tokens=200))))
    failed = await failure(drained(counting.stub.Generate(tokens_request([scripted_engine.NAN]))))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "NUMERIC")
    assert (await innocent)[-1].chunk.finish.usage.generated_tokens == 200
    score = pb.ScoreRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[scripted_engine.NAN, 5])))
    failed = await failure(counting.stub.Score(score))
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "NUMERIC")


async def test_full_in_sequences_is_refused_at_once_with_a_time_to_come_back(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, max_live_sequences=3) as server:
        calls = [server.stub.Generate(tokens_request([30 + i], max_tokens=300)) for i in range(3)]
        for call in calls:
            await call.read()
        steps = (await server.stats()).num_steps
        failed = await failure(drained(server.stub.Generate(tokens_request())))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert failed.retry_seconds is not None
        assert failed.metadata["grpc-retry-pushback-ms"] == str(round(failed.retry_seconds * 1000))
        assert (await server.stats()).num_steps < steps + 30
        # Probes and other methods are not subject to it.
        await server.models.ListModels(models_pb2.ListModelsRequest())
        await server.stub.Tokenize(pb.TokenizeRequest(prompt=pb.Prompt(text="x")))
        calls[0].cancel()
        await until(lambda: server.running.admission.stats().num_sequences == 2)
        assert await drained(server.stub.Generate(tokens_request(max_tokens=1)))
        # n counts n times; what could never fit is the request's own fault.
        failed = await failure(drained(server.stub.Generate(tokens_request(n=2))))
        assert failed.reason == "OVERLOADED"
        failed = await failure(drained(server.stub.Generate(tokens_request(n=4))))
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_TOO_LARGE")
        assert failed.retry_seconds is None
        for call in calls:
            call.cancel()
        await server.idle_stats()


async def test_a_refusal_comes_without_initial_metadata(tiny_llama_gguf: Path) -> None:
    """Only then may a mesh try another replica; and an admitted request is committed by its initial metadata."""
    engine = scripted_engine.command(step_seconds=0.3)
    async with bench(tiny_llama_gguf, engine, max_live_sequences=1) as server:
        begun = server.stub.Generate(tokens_request([9] * 400, max_tokens=1))
        await begun.initial_metadata()
        assert server.running.host.client().stats.num_steps == 0  # it came at admission, not with the first token
        options = [("grpc.enable_retries", 1), ("grpc.service_config", _RETRY_ON_FULL)]
        async with grpc.aio.insecure_channel(server.running.address, options=options) as channel:
            method = channel.unary_stream(INFERENCE + "Generate", response_deserializer=pb.GenerateResponse.FromString)
            # gRPC's own client obeys the pushback and retries a trailers-only refusal until there is room.
            assert await drained(method(tokens_request(max_tokens=1).SerializeToString()))
        await drained(begun)


_RETRY_ON_FULL = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "20s",
"maxBackoff": "20s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}"""


async def test_full_in_tokens_is_refused(tiny_llama_gguf: Path) -> None:
    engine = scripted_engine.command(step_seconds=0.02)
    async with bench(tiny_llama_gguf, engine, max_live_tokens=400) as server:
        call = server.stub.Generate(tokens_request([30] * 100, max_tokens=200))
        await call.read()
        assert server.running.admission.stats().num_tokens == 300
        failed = await failure(drained(server.stub.Generate(tokens_request([30] * 50, max_tokens=51))))
        assert (failed.code, failed.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert await drained(server.stub.Generate(tokens_request([30] * 90, max_tokens=10)))
        failed = await failure(drained(server.stub.Generate(tokens_request([30] * 100, max_tokens=301))))
        assert failed.reason == "REQUEST_TOO_LARGE"
        call.cancel()
        await server.idle_stats()


def _with_template(source: Path, directory: Path, template: str | None) -> Path:
    """A copy of a model's directory with another chat template, or with none."""
    shutil.copytree(source, directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["chat_template"] = template
    if template is None:
        del config["chat_template"]
    path.write_text(json.dumps(config))
    return directory


async def test_no_chat_template_is_told(tiny_llama_dir: Path, tmp_path: Path) -> None:
    directory = _with_template(tiny_llama_dir, tmp_path / "plain", None)
    async with bench(directory, scripted_engine.command()) as server:
        request = pb.GenerateRequest(prompt=chat_prompt("hi"))
        failed = await failure(drained(server.stub.Generate(request)))
        assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NO_CHAT_TEMPLATE")
        assert await drained(server.stub.Generate(tokens_request()))


@pytest.mark.parametrize(
    ("template", "code", "reason", "field"),
    [
        (
            "{{ raise_exception('CANARY-template') }}",
            grpc.StatusCode.INVALID_ARGUMENT,
            "TEMPLATE_REFUSED",
            ("prompt.chat.messages",),
        ),
        ("{{ CANARY.nothing.at_all }}", grpc.StatusCode.FAILED_PRECONDITION, "TEMPLATE_FAILED", ()),
        (
            "{% for i in range(9999999) %}{% for j in range(9999999) %}{% endfor %}{% endfor %}",
            grpc.StatusCode.FAILED_PRECONDITION,
            "TEMPLATE_FAILED",
            (),
        ),
    ],
)
async def test_a_bad_chat_template_fails_its_own_requests_only(
    tiny_llama_dir: Path, tmp_path: Path, template: str, code: grpc.StatusCode, reason: str, field: tuple[str, ...]
) -> None:
    directory = _with_template(tiny_llama_dir, tmp_path / "bad", template)
    async with bench(directory, scripted_engine.command()) as server:
        chat = asyncio.ensure_future(
            failure(drained(server.stub.Generate(pb.GenerateRequest(prompt=chat_prompt("h")))))
        )
        assert await drained(server.stub.Generate(tokens_request()))  # nobody waits for it
        failed = await chat
        assert (failed.code, failed.reason, failed.fields) == (code, reason, field)
        assert "CANARY" not in repr(failed)


async def test_a_bug_is_an_incident_number_and_nothing_else(
    counting: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_: ModelHost) -> None:
        raise ValueError(SECRET)

    monkeypatch.setattr(ModelHost, "prompts", broken)
    with caplog.at_level(logging.INFO):
        failed = await failure(drained(counting.stub.Generate(tokens_request())))
    monkeypatch.undo()
    assert (failed.code, failed.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    prefix = "Internal error. Incident "
    assert failed.message.startswith(prefix)
    incident = failed.message[len(prefix) :].rstrip(".")
    assert "CANARY" not in repr(failed)
    # The log has where it happened, under that number, and not the exception's text, which may hold a prompt.
    assert incident in caplog.text
    assert "in broken" in caplog.text
    assert "ValueError" in caplog.text
    assert "CANARY" not in caplog.text


async def test_no_content_in_logs(counting: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="headrace"):
        request = pb.GenerateRequest(prompt=chat_prompt("CANARY prompt"), request_label="label-7")
        request.sampling.stop.append("CANARY stop")
        request.cache_salt = "CANARY salt"
        request.sampling.max_tokens = 3
        await drained(counting.stub.Generate(request))
        request.sampling.top_p = 7
        await failure(drained(counting.stub.Generate(request)))
    assert "CANARY" not in caplog.text
    lines = [record.fields for record in caplog.records if record.name == "headrace.request"]  # type: ignore[attr-defined]
    good, bad = lines
    assert (good["status"], good["label"], good["generated_tokens"]) == ("OK", "label-7", 3)
    assert good["prompt_tokens"] > 5
    assert (bad["status"], bad["reason"]) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
