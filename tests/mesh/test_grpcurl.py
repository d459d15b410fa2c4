"""grpcurl, which knows nothing of us but what reflection tells it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.server.support import PATIENCE, Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")

GRPCURL = Path(sys.executable).with_name("grpcurl")


async def _grpcurl(server: Bench, *arguments: str, stdin: str = "", status: int = 0) -> str:
    if not GRPCURL.exists():
        pytest.fail("grpcurl is not in the virtual environment; run `make setup`", pytrace=False)
    before, after = [a for a in arguments if a.startswith("-")], [a for a in arguments if not a.startswith("-")]
    options = ["-plaintext", *(["-d", "@"] if stdin else []), *before]
    process = await asyncio.create_subprocess_exec(
        *(str(GRPCURL), *options, server.running.address, *after),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await asyncio.wait_for(process.communicate(stdin.encode()), PATIENCE)
    assert process.returncode == status, err.decode()
    return out.decode() + err.decode()


def _objects(text: str) -> list[Any]:
    """The JSON objects that grpcurl prints one after the other."""
    decoder, objects, start = json.JSONDecoder(), [], 0
    text = text.strip()
    while start < len(text):
        value, start = decoder.raw_decode(text, start)
        objects.append(value)
        while start < len(text) and text[start].isspace():
            start += 1
    return objects


async def test_list_and_describe(server: Bench) -> None:
    listed = (await _grpcurl(server, "list")).split()
    assert {"headrace.v1.InferenceService", "headrace.v1.ModelService", "grpc.health.v1.Health"} <= set(listed)
    described = await _grpcurl(server, "describe", "headrace.v1.InferenceService")
    assert "rpc Session ( stream .headrace.v1.SessionRequest )" in described
    described = await _grpcurl(server, "describe", "headrace.v1.SamplingParams")
    assert "temperature = 1" in described


async def test_generate(server: Bench) -> None:
    request = {"prompt": {"tokens": {"ids": [10]}}, "sampling": {"maxTokens": 3, "temperature": 0}}
    out = await _grpcurl(server, "headrace.v1.InferenceService/Generate", stdin=json.dumps(request))
    chunks = [answer["chunk"] for answer in _objects(out)]
    assert [token for chunk in chunks for token in chunk.get("token_ids", [])] == [11, 12, 13]
    assert chunks[-1]["finish"]["reason"] == "FINISH_REASON_LENGTH"


async def test_a_session_from_stdin(server: Bench) -> None:
    start = {"generationId": "a", "request": {"prompt": {"text": "Hello"}, "sampling": {"maxTokens": 2}}}
    commands = [{"start": start}, {"ping": {"nonce": "7"}}, {"cancel": {"generationId": "nothing"}}]
    stdin = "\n".join(json.dumps(command) for command in commands)
    events = _objects(await _grpcurl(server, "headrace.v1.InferenceService/Session", stdin=stdin))
    kinds = [next(iter(event)) for event in events]
    assert kinds[0] == "started"
    assert {"pong", "error", "chunk"} <= set(kinds)
    (finish,) = [e["chunk"]["chunk"]["finish"] for e in events if "finish" in e.get("chunk", {}).get("chunk", {})]
    assert finish["usage"]["generated_tokens"] == 2


async def test_errors_arrive_with_their_details(server: Bench) -> None:
    out = await _grpcurl(server, "headrace.v1.InferenceService/Generate", stdin="{}", status=64 + 3)
    assert "Code: InvalidArgument" in out
    assert "INVALID_REQUEST" in out
    assert "must be text, chat messages or token ids" in out


async def test_health(server: Bench) -> None:
    for name in ("", "tiny"):
        request = json.dumps({"service": name})
        (answer,) = _objects(await _grpcurl(server, "grpc.health.v1.Health/Check", stdin=request))
        assert answer == {"status": "SERVING"}
    (answer,) = _objects(await _grpcurl(server, "grpc.health.v1.Health/List"))
    assert answer["statuses"]["headrace.v1.InferenceService"] == {"status": "SERVING"}
