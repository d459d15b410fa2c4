"""The one wrapper around every RPC: raw bytes in, deadline, errors to statuses, one log line and one span at the end.

`app.py` registers services through `service_handler`; servicers see parsed messages and a `Call`, raise ServerError,
and know nothing of grpc.aio's traps:
  - a malformed message or an unhandled exception would reach the client as UNKNOWN with the exception's text;
  - a handler that is cancelled by anything but its RPC would send no status at all;
  - a failed write raises private exceptions of grpc, not CancelledError.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from headrace.server import errors, metrics, telemetry
from headrace.server.errors import ServerError
from opentelemetry.trace import Span

log = logging.getLogger("headrace.server")
request_log = logging.getLogger("headrace.request")

# How long past a client's own deadline we wait for its library to end the call before we end it ourselves.
_DEADLINE_GRACE_SECONDS = 5.0

# A cancelled call first looks half-closed (1 in 20 measured): its cancellation is told this much later at most, unless
# the machine is busy. Without the wait a stream with nothing left to do would end, and be logged, as OK.
_CANCEL_GRACE_SECONDS = 0.002


class ClientGoneError(Exception):
    """The RPC has ended under the handler: cancelled, or its connection lost."""


class Implementation(Protocol):
    """A handler. Unary: (request, call) -> response. Server stream: (request, call), writes to the call.
    Bidirectional: (requests, call) with an async iterator of requests."""

    def __call__(self, request: Any, call: Call, /) -> Awaitable[Message | None]: ...


class LoadReports(Protocol):
    """`orca.LoadReporter`, which serves an RPC itself."""

    def ended(self, *, is_failure: bool) -> None: ...
    def trailer(self) -> tuple[tuple[str, bytes], ...]: ...


@dataclass(frozen=True)
class Policy:
    """What holds for all methods of a service.

    is_logged: False for probes, which would drown the log and the traces. tenant_header: metadata key of the tenant.
    load: counts the calls, and adds to their trailers.
    """

    default_deadline: float
    max_deadline: float
    is_logged: bool = True
    tenant_header: str = ""
    load: LoadReports | None = None


class Call:
    """One RPC in progress, as a servicer sees it.

    deadline: CLOCK_MONOTONIC seconds. facts: what the log line and the span say at the end; never content.
    """

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], method: str, policy: Policy) -> None:
        self.method = method
        self.id = secrets.token_hex(16)  # the server's own; a caller's is a label
        self.facts: dict[str, str | int | float | bool] = {}
        self.label = ""
        self.tenant = _tenant(context, policy.tenant_header) if policy.tenant_header else ""
        self.started = time.monotonic()
        remaining = context.time_remaining()
        self.has_deadline = remaining is not None
        limit = policy.default_deadline if remaining is None else min(remaining, policy.max_deadline)
        self.is_cut = remaining is None or remaining > policy.max_deadline
        self.deadline = self.started + limit
        self._context = context
        self._is_admitted = False
        self._told: list[tuple[str, str]] = []
        self._task = asyncio.current_task()
        self._interruption: ServerError | None = None

    async def admit(self) -> None:
        """Send the initial metadata: the request is admitted, and nobody may retry it elsewhere from here on."""
        if not self._is_admitted:
            self._is_admitted = True
            await self._guarded(self._context.send_initial_metadata(tuple(self._told)))

    def tell(self, key: str, value: str) -> None:
        """Add an entry to the initial metadata, before `admit`."""
        self._told.append((key, value))

    async def write(self, message: Message) -> None:
        """Send one message of a stream. Waits while the client's window is full. Raises ClientGoneError."""
        await self._guarded(self._context.write(message.SerializeToString()))

    async def write_serialized(self, data: bytes) -> None:
        """`write` for a message that is serialised already."""
        try:  # not through `_guarded`: one coroutine less per token
            await self._context.write(data)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise ClientGoneError from error

    async def expire(self) -> None:
        """Call it when the deadline has passed and the work has stopped. The client's own clock ends the call: a
        DEADLINE_EXCEEDED from a server makes meshes eject a healthy host. A limit of ours is told as TIME_LIMIT."""
        if not self.is_cut:
            await asyncio.sleep(_DEADLINE_GRACE_SECONDS)  # ends in a CancelledError
        raise ServerError(errors.TIME_LIMIT)

    def interrupt(self, error: ServerError) -> None:
        """Make the handler stop where it waits, a blocked write included, and end the call with `error`."""
        self._interruption = error
        if self._task is not None:
            self._task.cancel()

    @property
    def interruption(self) -> ServerError | None:
        """Why the handler's task was cancelled by us; None where the RPC itself was."""
        return self._interruption

    async def _guarded(self, action: Awaitable[None]) -> None:
        try:
            await action
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise ClientGoneError from error


def service_handler(
    service: ServiceDescriptor, implementations: Mapping[str, Implementation], policy: Policy, alias: str = ""
) -> grpc.GenericRpcHandler[Any, Any]:
    """All methods of a service, by the names in its descriptor. alias: register under this full name instead.

    Raises KeyError where a method has no implementation.
    """
    name = alias or service.full_name
    handlers = {
        method.name: _method_handler(name, method, implementations[method.name], policy) for method in service.methods
    }
    return grpc.method_handlers_generic_handler(name, handlers)


def _method_handler(
    service_name: str, method: MethodDescriptor, implementation: Implementation, policy: Policy
) -> grpc.RpcMethodHandler[Any, Any]:
    request_class = GetMessageClass(method.input_type)
    full_name = f"{service_name}/{method.name}"

    async def unary(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        response: list[bytes] = []

        async def body(call: Call) -> None:
            message = await implementation(_parse(request_class, raw), call)
            assert message is not None
            response.append(message.SerializeToString())

        await _run(Call(context, full_name, policy), context, body, policy)
        return response[0]

    async def server_stream(raw: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async def body(call: Call) -> None:
            await implementation(_parse(request_class, raw), call)

        await _run(Call(context, full_name, policy), context, body, policy)

    async def bidirectional(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        async def body(call: Call) -> None:
            await implementation(_requests(request_class, context), call)

        await _run(Call(context, full_name, policy), context, body, policy)

    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(bidirectional)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(server_stream)
    return grpc.unary_unary_rpc_method_handler(unary)


def _parse(request_class: type[Message], raw: bytes) -> Message:
    message = request_class()
    try:
        message.ParseFromString(raw)
    except DecodeError:
        raise ServerError(errors.MALFORMED_REQUEST) from None
    return message


async def _requests(
    request_class: type[Message], context: grpc.aio.ServicerContext[Any, Any]
) -> AsyncIterator[Message]:
    while True:
        try:
            raw = await context.read()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise ClientGoneError from error
        if raw is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
            await asyncio.sleep(_CANCEL_GRACE_SECONDS)
            return
        yield _parse(request_class, raw)


async def _run(
    call: Call,
    context: grpc.aio.ServicerContext[Any, Any],
    body: Callable[[Call], Awaitable[None]],
    policy: Policy,
) -> None:
    """Run a handler's body; end the RPC with the status of whatever comes out of it."""
    with telemetry.server_span(call.method, _metadata(context), is_recorded=policy.is_logged) as span:
        failure: ServerError | None = None
        status = "OK"
        try:
            await body(call)
        except ServerError as error:
            failure = error
        except ClientGoneError:
            status = "CANCELLED"
        except asyncio.CancelledError:
            failure = call.interruption
            status = "CANCELLED"
        except Exception as error:
            failure = _incident(call, error)
        if failure is not None:
            status = failure.kind.code.name
        reason = failure.kind.reason if failure else ""
        telemetry.end_server_span(span, call.facts, status, reason)
        if policy.is_logged:
            metrics.call_ended(call.method, status, reason, time.monotonic() - call.started)
            if failure is not None:
                metrics.refused(failure.kind)
            _log_request(call, status, failure, span)
        trailer: tuple[tuple[str, str | bytes], ...] = ()
        if policy.load is not None:
            policy.load.ended(is_failure=status in ("INTERNAL", "UNAVAILABLE"))
            trailer = policy.load.trailer()
        if failure is not None:
            await context.abort(failure.kind.code, failure.message, failure.trailing_metadata() + trailer)
        if trailer and status == "OK":
            context.set_trailing_metadata(trailer)
        if status == "CANCELLED":
            raise asyncio.CancelledError


def _tenant(context: grpc.aio.ServicerContext[Any, Any], key: str) -> str:
    """The last value of a metadata key: what a proxy appends comes after what a client sent."""
    values = [value for name, value in context.invocation_metadata() or () if name == key]
    return values[-1] if values and isinstance(values[-1], str) else ""


def _metadata(context: grpc.aio.ServicerContext[Any, Any]) -> list[tuple[str, str | bytes]]:
    return [(key, value) for key, value in context.invocation_metadata() or ()]


def _incident(call: Call, error: Exception) -> ServerError:
    """Log a bug without its text, which could hold a prompt, and give the client nothing but a number."""
    incident = errors.new_incident()
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("incident %s in %s: %s\n%s", incident.incident, call.method, type(error).__name__, frames)
    return incident


def _log_request(call: Call, status: str, failure: ServerError | None, span: Span) -> None:
    fields: dict[str, str | int | float | bool] = {"request_id": call.id, "method": call.method, "status": status}
    context = span.get_span_context()
    if context.is_valid:
        fields["trace_id"] = format(context.trace_id, "032x")
    if failure is not None:
        fields["reason"] = failure.kind.reason
        if failure.incident:
            fields["incident"] = failure.incident
    if call.label:
        fields["label"] = call.label
    fields.update(call.facts)
    fields["seconds"] = round(time.monotonic() - call.started, 6)
    request_log.info("request", extra={"fields": fields})
