"""What SageMaker, Vertex AI and probes send, by their documented shapes; and the gateway when there is no server."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from tests.gateway.conftest import Http, gateway
from tests.server.support import Bench

pytestmark = pytest.mark.asyncio(loop_scope="session")

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}


async def _fetch(url: str, body: Any = None) -> tuple[int, str]:
    def fetch() -> tuple[int, str]:
        data = None if body is None else (body if isinstance(body, bytes) else json.dumps(body).encode())
        request = urllib.request.Request(url, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    return await asyncio.to_thread(fetch)


async def test_probes(http: Http) -> None:
    for path in ("/health", "/ready", "/ping"):
        assert (await _fetch(http.url + path))[0] == 200
    status, text = await _fetch(f"{http.url}/version")
    assert (status, list(json.loads(text))) == (200, ["version"])
    assert "/v1/chat/completions" in (await _fetch(f"{http.url}/openapi.json"))[1]


async def test_sagemaker_takes_either_kind(http: Http) -> None:
    status, text = await _fetch(f"{http.url}/invocations", CHAT)
    assert (status, json.loads(text)["object"]) == (200, "chat.completion")
    status, text = await _fetch(f"{http.url}/invocations", {"prompt": "x", "max_tokens": 2})
    assert (status, json.loads(text)["object"]) == (200, "text_completion")
    for bad in (b"not json", {"prompt": 5}, [1], {"messages": "x"}):
        status, text = await _fetch(f"{http.url}/invocations", bad)
        assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")


async def test_vertex_answers_its_instances_in_order(counting: Bench) -> None:
    async with gateway(counting, health_route="/vertex/health", predict_route="/vertex/predict") as http:
        assert (await _fetch(f"{http.url}/vertex/health"))[0] == 200
        instances = [{"prompt": [10]}, {"prompt": [20]}, CHAT]
        status, text = await _fetch(
            f"{http.url}/vertex/predict", {"instances": instances, "parameters": {"max_tokens": 2, "temperature": 0}}
        )
        predictions = json.loads(text)["predictions"]
        assert (status, [p["object"] for p in predictions]) == (200, ["text_completion"] * 2 + ["chat.completion"])
        assert predictions[0]["usage"]["completion_tokens"] == 2
        for bad in ({}, {"instances": "x"}, {"instances": [{"prompt": "x", "stream": True}]}, {"instances": [3]}):
            assert (await _fetch(f"{http.url}/vertex/predict", bad))[0] == 400


async def test_unknown_paths_and_methods_have_openais_form(http: Http) -> None:
    for path, body, wanted in (("/v2/nothing", None, 404), ("/v1/completions", None, 405)):
        status, text = await _fetch(http.url + path, body)
        assert status == wanted
        assert "error" in json.loads(text)
