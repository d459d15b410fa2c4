"""The names that users import: adding one is a decision, losing one breaks somebody."""

from __future__ import annotations

import inspect
import subprocess
import sys

import headrace.client

EXPORTED = [
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


def test_exported_names() -> None:
    assert sorted(headrace.client.__all__) == sorted(EXPORTED)
    assert all(hasattr(headrace.client, name) for name in EXPORTED)


def test_every_exported_name_is_documented() -> None:
    assert [name for name in EXPORTED if not inspect.getdoc(getattr(headrace.client, name))] == []


def test_sync_and_asyncio_take_the_same_arguments() -> None:
    pairs = {name: name for name in ("generate", "complete", "session", "tokenize", "detokenize", "score", "models",
                                     "get_model", "wait_ready")} | {"close": "aclose"}  # fmt: skip
    for sync, aio in pairs.items():
        ours = inspect.signature(getattr(headrace.client.Client, sync)).parameters
        theirs = inspect.signature(getattr(headrace.client.AsyncClient, aio)).parameters
        assert ours == theirs, sync
    for name in ("start", "append", "interrupt", "pause", "resume", "grant", "cancel", "update", "ping", "drain"):
        ours = inspect.signature(getattr(headrace.client.Session, name)).parameters
        assert ours == inspect.signature(getattr(headrace.client.AsyncSession, name)).parameters, name


def test_every_field_of_sampling_params_can_be_set() -> None:
    from headrace.v1 import inference_pb2 as pb

    fields = set(pb.SamplingParams.DESCRIPTOR.fields_by_name)
    assert fields == headrace.client.Sampling.__optional_keys__


def test_the_client_needs_no_package_of_the_server() -> None:
    code = "import sys, headrace.client; print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "numpy", "msgspec", "typer", "rich", "tokenizers"} & set(found)
