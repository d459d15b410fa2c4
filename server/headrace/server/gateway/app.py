"""The gateway's routes. Run by `headrace gateway`; `create_app` is for tests and embedders.

OpenAI: /v1/chat/completions, /v1/completions, /v1/models. Probes: /health (the gateway answers), /ready (the model
does), /version. SageMaker: /ping and /invocations. Vertex AI: the routes that AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE
name. /docs describes it all.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from headrace.client import AsyncClient, HeadraceError
from headrace.client.types import ModelInfo
from headrace.server.gateway import errors
from headrace.server.gateway.errors import Problem, ProblemError
from headrace.server.gateway.generate import Generator
from headrace.server.gateway.schema import ChatRequest, CompletionRequest
from headrace.server.gateway.token_texts import TokenTexts
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException

_READY_SECONDS = 2.0
# What a caller says about its call that the server wants to hear too.
_FORWARDED = ("traceparent", "tracestate", "x-request-id")
T = TypeVar("T")
Body = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class GatewaySettings:
    """target: the gRPC server's address. timeout: seconds that a call may take; None: the server's default.
    health_route, predict_route: further paths of Vertex AI; empty: none."""

    target: str = "127.0.0.1:50051"
    timeout: float | None = None
    health_route: str = ""
    predict_route: str = ""


def create_app(settings: GatewaySettings) -> FastAPI:
    """The ASGI application; it connects when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncClient(settings.target, timeout=settings.timeout) as client:
            app.state.gateway = Gateway(client)
            yield

    app = FastAPI(title="Headrace gateway", version=version("headrace"), lifespan=lifespan)
    app.add_exception_handler(HeadraceError, lambda _, error: errors.from_server(_as(HeadraceError, error)).response())
    app.add_exception_handler(ProblemError, lambda _, error: _as(ProblemError, error).problem.response())
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name:path}", model)
    app.add_api_route("/version", versions)
    app.add_api_route("/health", health, response_model=None)
    for path in {"/ready", "/ping", settings.health_route} - {"", "/health"}:
        app.add_api_route(path, ready, response_model=None)
    app.add_api_route("/invocations", invocations, methods=["POST"], response_model=None)
    if settings.predict_route:
        app.add_api_route(settings.predict_route, predict, methods=["POST"], response_model=None)
    return app


class Gateway:
    """What the routes share."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.generator = Generator(client, TokenTexts(client))
        self._default: str | None = None

    async def model_name(self) -> str:
        """The server's only model, for requests that name none."""
        if self._default is None:
            self._default = (await self.client.get_model()).name
        return self._default

    async def respond(self, body: Body, request: Request) -> Response:
        """An answer or a stream."""
        metadata = [(key, request.headers[key]) for key in _FORWARDED if key in request.headers]
        body.model = body.model or await self.model_name()
        if body.stream:
            events = await _unless_gone(request, self.generator.stream(body, metadata))
            return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-store"})
        return JSONResponse(await _unless_gone(request, self.generator.answer(body, metadata)))


async def chat_completions(body: ChatRequest, request: Request) -> Response:
    """OpenAI's chat completions."""
    return await _gateway(request).respond(body, request)


async def completions(body: CompletionRequest, request: Request) -> Response:
    """OpenAI's completions."""
    return await _gateway(request).respond(body, request)


async def models(request: Request) -> dict[str, Any]:
    """The server's models."""
    return {"object": "list", "data": [_model(info) for info in await _gateway(request).client.models()]}


async def model(name: str, request: Request) -> dict[str, Any]:
    """One of them."""
    return _model(await _gateway(request).client.get_model(name))


async def versions() -> dict[str, str]:
    """Of this gateway."""
    return {"version": version("headrace")}


async def health() -> Response:
    """The gateway runs; whether a model answers, /ready says."""
    return Response()


async def ready(request: Request) -> Response:
    """The server behind says SERVING; else 503."""
    try:
        await _gateway(request).client.wait_ready(_READY_SECONDS)
    except HeadraceError as error:
        return errors.from_server(error).response()
    return Response()


async def invocations(request: Request) -> Response:
    """SageMaker: the body of a chat completion or a completion, told apart by `messages`."""
    return await _gateway(request).respond(await _either(request), request)


async def predict(request: Request) -> Response:
    """Vertex AI: {"instances": [body, ...], "parameters": {...}}, each instance the body of a chat completion or a
    completion, with the parameters for all; answers {"predictions": [...]}."""
    raw = _json(await request.body())
    instances, parameters = (raw.get("instances"), raw.get("parameters") or {}) if isinstance(raw, dict) else (None, {})
    if not isinstance(instances, list) or not isinstance(parameters, dict) or not instances:
        raise ProblemError(Problem(400, "instances: must be a list of requests", "instances", "INVALID_REQUEST"))
    gateway = _gateway(request)
    bodies = []
    for instance in instances:
        body = _parsed({**parameters, **instance} if isinstance(instance, dict) else instance)
        if body.stream:
            raise ProblemError(Problem(400, "stream: predictions are not streamed", "stream", "INVALID_REQUEST"))
        body.model = body.model or await gateway.model_name()
        bodies.append(body)
    answers = asyncio.gather(*(gateway.generator.answer(body, []) for body in bodies))
    return JSONResponse({"predictions": await _unless_gone(request, answers)})


def _gateway(request: Request) -> Gateway:
    return _as(Gateway, request.app.state.gateway)


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": 0,
        "owned_by": "headrace",
        "max_model_len": info.context_length,
    }


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result; it is cancelled where the client goes away meanwhile."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ProblemError(Problem(499, "the client has gone away", None, "CANCELLED"))
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        with suppress(asyncio.CancelledError):
            await gone


async def _gone(request: Request) -> None:
    """Until the client has disconnected. The body has been read: nothing but that can come."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _either(request: Request) -> Body:
    return _parsed(_json(await request.body()))


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        raise ProblemError(Problem(400, "the body is not JSON", None, "INVALID_REQUEST")) from None


def _parsed(value: Any) -> Body:
    kind: type[Body] = ChatRequest if isinstance(value, dict) and "messages" in value else CompletionRequest
    adapter: TypeAdapter[Body] = TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ProblemError(errors.from_validation(error.errors())) from None


def _refuse_body(_: Request, error: Exception) -> JSONResponse:
    return errors.from_validation(list(_as(RequestValidationError, error).errors())).response()


def _refuse_route(_: Request, error: Exception) -> JSONResponse:
    refused = _as(HTTPException, error)
    return Problem(refused.status_code, str(refused.detail), None, None).response()


def _as(kind: type[T], value: object) -> T:
    assert isinstance(value, kind)
    return value
