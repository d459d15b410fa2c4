"""How the clients connect: channel options, the retry policy, metadata, and the health protocol.

Both clients use all of it, so that they retry, keep alive and wait alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version

import grpc
from google.protobuf import wrappers_pb2

try:  # no dependency of the client
    from opentelemetry.propagate import inject as _inject
except ImportError:
    _inject = None  # type: ignore[assignment]

Metadata = Mapping[str, str] | Iterable[tuple[str, str]]

# grpc.health.v1: HealthCheckRequest is {string service = 1} and HealthCheckResponse {enum status = 1}, which on the
# wire are StringValue and Int32Value. So the client needs no further package for two messages of one field.
HEALTH_WATCH = "/grpc.health.v1.Health/Watch"
SERVING = 1
# What ends a health watch without saying anything about the model: not reachable yet, restarting, out of time.
TRANSIENT_CODES = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)

# A refused call (nothing admitted, no initial metadata sent) is tried again, up to 4 tries in all. gRPC waits for the
# server's grpc-retry-pushback-ms where it sends one, and does not retry at all where that is negative.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "headrace.v1.InferenceService"}, {"service": "headrace.v1.ModelService"}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.2s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ],
    "loadBalancingConfig": [{"round_robin": {}}],
}
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024  # a whole context of tokens with 20 alternatives each fits


def encode_health_request(service: str) -> bytes:
    """A serialised HealthCheckRequest."""
    return wrappers_pb2.StringValue(value=service).SerializeToString()


def decode_health_response(data: bytes) -> int:
    """The status of a serialised HealthCheckResponse."""
    return wrappers_pb2.Int32Value.FromString(data).value


def channel_options(*, retries: bool) -> list[tuple[str, int | str]]:
    """Options of the channel. Keep-alive pings find a dead peer within 40 s, and only while a call is running."""
    options: list[tuple[str, int | str]] = [
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
        ("grpc.primary_user_agent", f"headrace-python/{_client_version()}"),
        ("grpc.enable_retries", int(retries)),
    ]
    if retries:
        options.append(("grpc.service_config", json.dumps(_SERVICE_CONFIG)))
    return options


def merge_metadata(common: Metadata | None, own: Metadata | None) -> tuple[tuple[str, str], ...] | None:
    """The client's metadata followed by the call's; keys in lower case, as gRPC demands. Where the caller uses
    OpenTelemetry, the context of its current span goes along, and the server's spans hang below that."""
    pairs = [*_pairs(common), *_pairs(own)]
    if _inject is not None and not any(key.lower() == "traceparent" for key, _ in pairs):
        carrier: dict[str, str] = {}
        _inject(carrier)
        pairs += carrier.items()
    return tuple((key.lower(), value) for key, value in pairs) or None


def make_credentials(tls: bool | grpc.ChannelCredentials) -> grpc.ChannelCredentials | None:
    """True means the system's root certificates, False plain text."""
    if isinstance(tls, bool):
        return grpc.ssl_channel_credentials() if tls else None
    return tls


def _pairs(metadata: Metadata | None) -> Iterable[tuple[str, str]]:
    if metadata is None:
        return ()
    return metadata.items() if isinstance(metadata, Mapping) else metadata


def _client_version() -> str:
    try:
        return version("headrace")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0"
