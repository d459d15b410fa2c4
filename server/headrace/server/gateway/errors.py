"""Errors of the gateway in OpenAI's form: {"error": {"message", "type", "param", "code"}}, and the HTTP status of each.

`code` is the server's stable reason (docs/API.md); `param` the first field that was refused, as the JSON has it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from fastapi.responses import JSONResponse
from headrace.client import HeadraceError

_C = grpc.StatusCode
# RELIABILITY's table of statuses; what is not here is 500.
_HTTP = {
    _C.INVALID_ARGUMENT: 400,
    _C.OUT_OF_RANGE: 400,
    _C.FAILED_PRECONDITION: 400,
    _C.UNAUTHENTICATED: 401,
    _C.PERMISSION_DENIED: 403,
    _C.NOT_FOUND: 404,
    _C.ALREADY_EXISTS: 409,
    _C.ABORTED: 409,
    _C.RESOURCE_EXHAUSTED: 429,
    _C.CANCELLED: 499,
    _C.UNIMPLEMENTED: 501,
    _C.UNAVAILABLE: 503,
    _C.DEADLINE_EXCEEDED: 504,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
# Paths in the gRPC request and the names of the same things in OpenAI's.
_PARAMS = {"prompt": "prompt", "prompt.chat.messages": "messages", "sampling.logprobs": "top_logprobs"}


@dataclass(frozen=True)
class Problem:
    """An error on its way to an HTTP response or into a stream."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after: float | None = None

    def body(self) -> dict[str, Any]:
        """The JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        headers: Mapping[str, str] = {}
        if self.retry_after is not None:
            headers = {"retry-after": str(max(1, math.ceil(self.retry_after)))}
        return JSONResponse(self.body(), self.status, headers=headers)


class ProblemError(Exception):
    """Carries a Problem to the handler of exceptions."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def from_server(error: HeadraceError) -> Problem:
    """What the gRPC server said."""
    field = error.fields[0].field if error.fields else None
    return Problem(
        _HTTP.get(error.code, 500), error.message, _param(field), error.reason or error.code.name, error.retry_after
    )


def from_validation(faults: list[Any]) -> Problem:
    """What pydantic said of a body: the first fault, all of them in the message."""
    places = [".".join(str(part) for part in fault["loc"] if part != "body") for fault in faults]
    message = "; ".join(
        f"{place}: {fault['msg']}" if place else fault["msg"] for place, fault in zip(places, faults, strict=True)
    )
    return Problem(400, message[:2000], places[0] or None, "INVALID_REQUEST")


def _param(field: str | None) -> str | None:
    if field is None:
        return None
    field = field.removeprefix("request.")  # of a CompleteRequest
    return _PARAMS.get(field, field.removeprefix("sampling."))
