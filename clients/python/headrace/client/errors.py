"""The exceptions of the client: one tree, one class per gRPC status, filled from the google.rpc details.

`error_from_rpc` is called wherever a call fails; `error_from_session` where a Session command or generation does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from headrace.v1 import inference_pb2 as pb

_DETAILS_KEY = "grpc-status-details-bin"  # the trailer that holds a serialised google.rpc.Status


@dataclass(frozen=True)
class FieldViolation:
    """A field of the request that was refused: its path in the request message, and why."""

    field: str
    description: str


class HeadraceError(Exception):
    """Anything that a server or the way to it answered instead of a result.

    Attributes: `code` (grpc.StatusCode), `reason` (the stable name from docs/API.md; empty where the error does not
    come from Headrace), `message` (a sentence for people), `fields` (refused fields), `retry_after` (seconds to wait
    before another try, None where the server names none), `info` (further facts by name), `generation_id` (within a
    session, the generation it concerns; else empty).
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        fields: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
        info: dict[str, str] | None = None,
        generation_id: str = "",
    ) -> None:
        self.code = code
        self.message = message
        self.reason = reason
        self.fields = fields
        self.retry_after = retry_after
        self.info = info or {}
        self.generation_id = generation_id
        super().__init__(self._sentence())

    def _sentence(self) -> str:
        parts = [f"{self.code.name}{f' ({self.reason})' if self.reason else ''}: {self.message}"]
        # The server's sentence names the first refused field already.
        parts += [f"{v.field}: {v.description}" for v in self.fields if v.field not in self.message]
        if self.retry_after is not None:
            parts.append(f"retry after {self.retry_after:g} s")
        return "; ".join(parts)


class InvalidRequestError(HeadraceError):
    """INVALID_ARGUMENT or OUT_OF_RANGE: the request is wrong and will stay so; see `fields`."""


class NotFoundError(HeadraceError):
    """NOT_FOUND: no such model, conversation or generation."""


class AlreadyExistsError(HeadraceError):
    """ALREADY_EXISTS: the generation's or conversation's name is in use on this session."""


class FailedPreconditionError(HeadraceError):
    """FAILED_PRECONDITION: the model cannot do this, for example chat without a chat template."""


class OverloadedError(HeadraceError):
    """RESOURCE_EXHAUSTED: the server is full or a quota is used up; see `retry_after`."""


class UnavailableError(HeadraceError):
    """UNAVAILABLE: not reachable, still loading, draining, or its engine has just died. Another try may work."""


class DeadlineExceededError(HeadraceError):
    """DEADLINE_EXCEEDED: the timeout of the call passed."""


class RequestCancelledError(HeadraceError):
    """CANCELLED: the call was cancelled, here or on the way."""


class UnauthenticatedError(HeadraceError):
    """UNAUTHENTICATED or PERMISSION_DENIED: the server does not let this caller do this."""


class UnimplementedError(HeadraceError):
    """UNIMPLEMENTED: the server does not offer this call; it may be older than the client, or not Headrace."""


class ServerError(HeadraceError):
    """INTERNAL, UNKNOWN, ABORTED or DATA_LOSS: the server failed."""


_BY_CODE: dict[grpc.StatusCode, type[HeadraceError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.CANCELLED: RequestCancelledError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: UnauthenticatedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
}
_CODE_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def make_error(code: grpc.StatusCode, message: str, **facts: object) -> HeadraceError:
    """The exception of the class that belongs to `code`; `facts` are keyword arguments of HeadraceError."""
    return _BY_CODE.get(code, ServerError)(code, message, **facts)  # type: ignore[arg-type]


def error_from_rpc(error: grpc.RpcError) -> HeadraceError:
    """Decodes the failure of a call, sync (a grpc.Call too) or asyncio (grpc.aio.AioRpcError)."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    try:
        return _decode_details(code, message, _find_status(error.trailing_metadata() or ()))
    except DecodeError:  # a proxy's or another server's bytes; the plain status still says something
        return make_error(code, message)


def error_from_session(event: pb.SessionError) -> HeadraceError:
    """Decodes the failure of a Session's command or generation; the stream itself goes on."""
    code = _CODE_BY_NUMBER.get(event.code, grpc.StatusCode.UNKNOWN)
    return make_error(
        code,
        event.message or code.name,
        reason=event.reason,
        fields=(FieldViolation(event.field, event.message),) if event.field else (),
        retry_after=event.retry_after_seconds or None,
        generation_id=event.generation_id,
    )


def _find_status(metadata: Iterable[Any]) -> status_pb2.Status:
    for key, value in metadata:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return status_pb2.Status()


def _decode_details(code: grpc.StatusCode, message: str, status: status_pb2.Status) -> HeadraceError:
    info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
    has_retry = False
    for detail in status.details:
        if not detail.Unpack(info) and not detail.Unpack(bad):
            has_retry |= detail.Unpack(retry)
    return make_error(
        code,
        message,
        reason=info.reason,
        fields=tuple(FieldViolation(v.field, v.description) for v in bad.field_violations),
        retry_after=retry.retry_delay.ToTimedelta().total_seconds() if has_retry else None,
        info=dict(info.metadata),
    )
