"""What a failed call tells its caller: every google.rpc detail, and never a crash over a strange one."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from headrace.client import (
    FieldViolation,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerError,
    UnavailableError,
)
from headrace.client.errors import error_from_rpc, error_from_session
from headrace.v1 import inference_pb2 as pb


def rpc_error(code: grpc.StatusCode, message: str, trailer: bytes | None = None) -> grpc.aio.AioRpcError:
    pairs = [] if trailer is None else [("grpc-status-details-bin", trailer)]
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*pairs), message)


def status(*details: object) -> bytes:
    packed = []
    for detail in details:
        box = any_pb2.Any()
        box.Pack(detail)  # type: ignore[arg-type]
        packed.append(box)
    return status_pb2.Status(details=packed).SerializeToString()


_BROKEN_DETAIL = any_pb2.Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\xff")
BROKEN = status_pb2.Status(details=[_BROKEN_DETAIL]).SerializeToString()


def test_all_details_are_decoded() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="sampling.top_p", description="must be at most 1")
    trailer = status(
        error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="headrace.dev", metadata={"incident": "7"}),
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
        error_details_pb2.QuotaFailure(),
    )
    error = error_from_rpc(rpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED, "The server is full.", trailer))
    assert type(error) is OverloadedError
    assert error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.reason == "OVERLOADED"
    assert error.info == {"incident": "7"}
    assert error.fields == (FieldViolation("sampling.top_p", "must be at most 1"),)
    assert error.retry_after == 1.5
    assert str(error) == (
        "RESOURCE_EXHAUSTED (OVERLOADED): The server is full.; sampling.top_p: must be at most 1; retry after 1.5 s"
    )


def test_a_retry_after_zero_seconds_is_not_none() -> None:
    trailer = status(error_details_pb2.RetryInfo())
    assert error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "x", trailer)).retry_after == 0


@pytest.mark.parametrize("trailer", [None, b"", b"\xff\xff\xff", status(duration_pb2.Duration()), BROKEN])
def test_strange_or_missing_details_leave_the_plain_status(trailer: bytes | None) -> None:
    error = error_from_rpc(rpc_error(grpc.StatusCode.UNAVAILABLE, "connection refused", trailer))
    assert type(error) is UnavailableError
    assert (error.message, error.reason, error.fields, error.retry_after) == ("connection refused", "", (), None)


def test_every_status_has_a_class() -> None:
    for code in set(grpc.StatusCode) - {grpc.StatusCode.OK}:
        error = error_from_rpc(rpc_error(code, ""))
        assert isinstance(error, HeadraceError)
        assert error.code is code
        assert error.message == code.name
    failed = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.ABORTED, grpc.StatusCode.DATA_LOSS}
    plain = {c for c in grpc.StatusCode if type(error_from_rpc(rpc_error(c, ""))) is ServerError}
    assert plain - {grpc.StatusCode.OK} == failed


def test_a_session_error_is_decoded_alike() -> None:
    event = pb.SessionError(
        generation_id="g1", code=3, reason="INVALID_REQUEST", message="bad", field="sampling.n", retry_after_seconds=2
    )
    error = error_from_session(event)
    assert type(error) is InvalidRequestError
    assert (error.generation_id, error.reason, error.retry_after) == ("g1", "INVALID_REQUEST", 2.0)
    assert error.fields == (FieldViolation("sampling.n", "bad"),)
    assert type(error_from_session(pb.SessionError(code=5))) is NotFoundError
    assert type(error_from_session(pb.SessionError(code=999))) is ServerError
