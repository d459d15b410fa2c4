"""Every error a client can see: one table from reason to status, and the exceptions that carry one.

Raised anywhere in the front end, turned into a gRPC status by `rpc.py` (or into a Session event by `session.py`). The
texts are fixed here; no exception text, path, address or value of another caller can get into them. docs/API.md prints
CATALOGUE.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "headrace.dev"


@dataclass(frozen=True)
class ErrorKind:
    """One row of the catalogue. is_retryable: the same request may succeed later or elsewhere."""

    reason: str
    code: grpc.StatusCode
    message: str
    is_retryable: bool = False


_C = grpc.StatusCode
MALFORMED_REQUEST = ErrorKind("MALFORMED_REQUEST", _C.INVALID_ARGUMENT, "The request is not a valid protobuf message.")
INVALID_REQUEST = ErrorKind("INVALID_REQUEST", _C.INVALID_ARGUMENT, "The request has fields that are out of range.")
PROMPT_TOO_LONG = ErrorKind(
    "PROMPT_TOO_LONG", _C.INVALID_ARGUMENT, "The prompt and max_tokens do not fit into the model's context."
)
TEMPLATE_REFUSED = ErrorKind(
    "TEMPLATE_REFUSED", _C.INVALID_ARGUMENT, "The model's chat template does not accept these messages."
)
TEMPLATE_FAILED = ErrorKind(
    "TEMPLATE_FAILED", _C.FAILED_PRECONDITION, "The model's chat template cannot render these messages."
)
NO_CHAT_TEMPLATE = ErrorKind("NO_CHAT_TEMPLATE", _C.FAILED_PRECONDITION, "The model has no chat template.")
MODEL_NOT_FOUND = ErrorKind("MODEL_NOT_FOUND", _C.NOT_FOUND, "This server has no model of that name.")
SERVICE_NOT_KNOWN = ErrorKind("SERVICE_NOT_KNOWN", _C.NOT_FOUND, "This server has no service of that name.")
MODEL_LOADING = ErrorKind("MODEL_LOADING", _C.UNAVAILABLE, "The model is being loaded.", is_retryable=True)
MODEL_FAILED = ErrorKind("MODEL_FAILED", _C.UNAVAILABLE, "The model cannot be run on this server.")
ENGINE_RESTARTED = ErrorKind(
    "ENGINE_RESTARTED", _C.UNAVAILABLE, "The engine stopped while it worked on this request.", is_retryable=True
)
DRAINING = ErrorKind("DRAINING", _C.UNAVAILABLE, "The server is shutting down.", is_retryable=True)
OVERLOADED = ErrorKind("OVERLOADED", _C.RESOURCE_EXHAUSTED, "The server is full.", is_retryable=True)
DEADLINE_UNMEETABLE = ErrorKind(
    "DEADLINE_UNMEETABLE", _C.RESOURCE_EXHAUSTED, "The request cannot be done by its deadline here.", is_retryable=True
)
REQUEST_TOO_LARGE = ErrorKind(
    "REQUEST_TOO_LARGE", _C.INVALID_ARGUMENT, "The request alone needs more than this server ever holds at once."
)
SLOW_READER = ErrorKind("SLOW_READER", _C.RESOURCE_EXHAUSTED, "The stream was not read for too long.")
TIME_LIMIT = ErrorKind(
    "TIME_LIMIT", _C.RESOURCE_EXHAUSTED, "The server's limit on the time of one request was reached."
)
SESSION_FULL = ErrorKind("SESSION_FULL", _C.RESOURCE_EXHAUSTED, "This session holds as much as a session may.")
GENERATION_EXISTS = ErrorKind("GENERATION_EXISTS", _C.ALREADY_EXISTS, "The generation_id is in use on this stream.")
GENERATION_NOT_FOUND = ErrorKind("GENERATION_NOT_FOUND", _C.NOT_FOUND, "No generation of that id runs on this stream.")
CONVERSATION_EXISTS = ErrorKind(
    "CONVERSATION_EXISTS", _C.ALREADY_EXISTS, "The conversation_id is in use on this stream."
)
CONVERSATION_NOT_FOUND = ErrorKind(
    "CONVERSATION_NOT_FOUND", _C.NOT_FOUND, "No conversation of that id is kept on this stream."
)
CONVERSATION_BUSY = ErrorKind(
    "CONVERSATION_BUSY", _C.FAILED_PRECONDITION, "The conversation's last generation has not ended."
)
GENERATION_UNKNOWN = ErrorKind(
    "GENERATION_UNKNOWN", _C.NOT_FOUND, "This server keeps no resumable generation of that id for this caller."
)
OFFSET_AHEAD = ErrorKind("OFFSET_AHEAD", _C.OUT_OF_RANGE, "The generation has not come to that offset yet.")
OFFSET_NOT_KEPT = ErrorKind("OFFSET_NOT_KEPT", _C.OUT_OF_RANGE, "No message that begins at that offset is kept.")
SUPERSEDED = ErrorKind("SUPERSEDED", _C.ABORTED, "A newer call reads this generation.")
PROMPT_DIFFERS = ErrorKind(
    "PROMPT_DIFFERS", _C.FAILED_PRECONDITION, "The prompt is not the one that the generation began with."
)
MODEL_DIFFERS = ErrorKind(
    "MODEL_DIFFERS", _C.FAILED_PRECONDITION, "The model is not the one that the generation began with."
)
ARITHMETIC_DIFFERS = ErrorKind(
    "ARITHMETIC_DIFFERS", _C.FAILED_PRECONDITION, "This server computes otherwise than where the generation began."
)
CREDIT_UNLIMITED = ErrorKind(
    "CREDIT_UNLIMITED", _C.FAILED_PRECONDITION, "The generation was started without credit_tokens and needs no credit."
)
SESSION_IDLE = ErrorKind(
    "SESSION_IDLE", _C.ABORTED, "Nothing ran on the session and no command came for the server's idle time."
)
NUMERIC = ErrorKind("NUMERIC", _C.INTERNAL, "The model produced numbers that are not finite.")
INTERNAL = ErrorKind("INTERNAL", _C.INTERNAL, "Internal error.")

CATALOGUE: tuple[ErrorKind, ...] = tuple(value for value in list(globals().values()) if isinstance(value, ErrorKind))


@dataclass(frozen=True)
class Violation:
    """A fault of one field. field: dotted path from the request, e.g. "sampling.top_p" or
    "prompt.chat.messages[2].role"."""

    field: str
    description: str
    reason: str  # REQUIRED, OUT_OF_RANGE, TOO_LONG, TOO_MANY, DUPLICATE, NOT_FINITE, BAD_CHARACTER, CONFLICT


class ServerError(Exception):
    """What a client is told. Raise it with a row of the catalogue."""

    def __init__(
        self,
        kind: ErrorKind,
        *,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
        quota: str = "",
        incident: str = "",
    ) -> None:
        super().__init__(kind.reason)
        self.kind = kind
        self.violations = violations
        self.retry_after = retry_after
        self.quota = quota
        self.incident = incident

    @property
    def message(self) -> str:
        """The sentence for people: the catalogue's, with the first violation or the incident's id."""
        if self.incident:
            return f"{self.kind.message} Incident {self.incident}."
        if self.violations:
            first = self.violations[0]
            more = len(self.violations) - 1
            return f"{self.kind.message} {first.field}: {first.description}" + (f" (and {more} more)" if more else "")
        return self.kind.message

    def status(self) -> status_pb2.Status:
        """The google.rpc.Status with all details."""
        info = error_details_pb2.ErrorInfo(reason=self.kind.reason, domain=DOMAIN)
        if self.incident:
            info.metadata["incident"] = self.incident
        details: list[Message] = [info]
        if self.violations:
            details.append(
                error_details_pb2.BadRequest(
                    field_violations=[
                        error_details_pb2.BadRequest.FieldViolation(
                            field=v.field, description=v.description, reason=v.reason
                        )
                        for v in self.violations
                    ]
                )
            )
        if self.quota:
            violation = error_details_pb2.QuotaFailure.Violation(subject=self.quota, description=self.kind.message)
            details.append(error_details_pb2.QuotaFailure(violations=[violation]))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after * 1e9))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed = []
        for detail in details:
            box = any_pb2.Any()
            box.Pack(detail)
            packed.append(box)
        return status_pb2.Status(code=self.kind.code.value[0], message=self.message, details=packed)

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The status's details, and the pushback that gRPC clients obey (gRFC A6): when to retry, or not to."""
        metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", self.status().SerializeToString())]
        if self.retry_after is not None:
            metadata.append(("grpc-retry-pushback-ms", str(max(1, round(self.retry_after * 1000)))))
        elif not self.kind.is_retryable:
            metadata.append(("grpc-retry-pushback-ms", "-1"))
        return tuple(metadata)


class InvalidRequestError(ServerError):
    """One or more fields are at fault; all of them are named."""

    def __init__(self, violations: list[Violation], kind: ErrorKind = INVALID_REQUEST) -> None:
        super().__init__(kind, violations=tuple(violations))


class OverloadedError(ServerError):
    """There is no room now. quota: what is used up, for QuotaFailure."""

    def __init__(self, retry_after: float, quota: str) -> None:
        super().__init__(OVERLOADED, retry_after=retry_after, quota=quota)


class InternalError(ServerError):
    """A bug. The incident's id is all that a client learns; the log has the rest under it."""

    def __init__(self, incident: str) -> None:
        super().__init__(INTERNAL, incident=incident)


def new_incident() -> InternalError:
    """An InternalError with a fresh id; the caller logs what happened under `.incident`."""
    return InternalError(secrets.token_hex(6))
