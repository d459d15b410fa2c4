"""The Python client of Headrace: typed, blocking and asyncio, without protobuf in sight.

    from headrace.client import Client

    with Client("127.0.0.1:50051") as client:
        for chunk in client.generate("Once upon a time", max_tokens=32):
            print(chunk.text, end="", flush=True)

It imports grpc and headrace.v1 only; what is exported here is all there is (tests/clients/test_exports.py).
"""

from headrace.client.aio import AsyncClient
from headrace.client.aio_generation import AsyncGeneration
from headrace.client.aio_session import AsyncSession, AsyncSessionGeneration
from headrace.client.errors import (
    AlreadyExistsError,
    DeadlineExceededError,
    FailedPreconditionError,
    FieldViolation,
    HeadraceError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    RequestCancelledError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from headrace.client.sync import Client
from headrace.client.sync_generation import Generation
from headrace.client.sync_session import Session, SessionGeneration
from headrace.client.types import (
    Chunk,
    Completion,
    Finish,
    Message,
    ModelInfo,
    Pong,
    Receipt,
    Sampling,
    Scores,
    StopConditions,
    Timing,
    TokenAlternative,
    TokenLogprob,
    Tokens,
    Usage,
)

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "AsyncGeneration",
    "AsyncSession",
    "AsyncSessionGeneration",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "FailedPreconditionError",
    "FieldViolation",
    "Finish",
    "Generation",
    "HeadraceError",
    "InvalidRequestError",
    "Message",
    "ModelInfo",
    "NotFoundError",
    "OverloadedError",
    "Pong",
    "Receipt",
    "RequestCancelledError",
    "Sampling",
    "Scores",
    "ServerError",
    "Session",
    "SessionGeneration",
    "StopConditions",
    "Timing",
    "TokenAlternative",
    "TokenLogprob",
    "Tokens",
    "UnauthenticatedError",
    "UnavailableError",
    "UnimplementedError",
    "Usage",
]
