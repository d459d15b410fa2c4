"""What a client that resumes knows of a generation, and what it asks for next; shared by sync and asyncio, free of I/O.

`sync_generation.py` and `aio_generation.py` hand it every message and every failure. After a failure it says what next:
attach again (`Resume`), which is cheap and possible where the server still lives; else go on with the tokens held
(`GenerateRequest.continuation`), which any replica can do. Nothing is given to the caller twice, and nothing is left
out: a message whose offset is not the number of tokens held is an error.
"""

from __future__ import annotations

import random
import secrets
import time
from dataclasses import dataclass

import grpc
from headrace.client.errors import HeadraceError, make_error
from headrace.v1 import inference_pb2 as pb

# Envoy's stateful session filter puts the replica's name into this header of a response (deploy/envoy/envoy.yaml); sent
# back, it leads Resume and Cancel to the replica that has the generation.
REPLICA_KEY = "headrace-replica"
MAX_ATTEMPTS = 8  # failures in a row without a new message
_MAX_RESUMES = 3  # of those, calls of Resume; then with the tokens held
_FIRST_BACKOFF, _MAX_BACKOFF = 0.1, 5.0  # seconds; the first try again comes at once
CANCEL_SECONDS = 2.0  # for telling a server that a generation is not wanted any more

# What says that a connection, a proxy or a server broke, not the request. Envoy reports a killed server as INTERNAL,
# without a reason of ours.
_BROKEN_CODES = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
_BROKEN_CODES_WITHOUT_REASON = frozenset(
    {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}
)
_FINAL_REASONS = frozenset({"MODEL_FAILED", "TIME_LIMIT"})
# Resume cannot help here, a continuation can.
_NOT_KEPT_REASONS = frozenset({"GENERATION_UNKNOWN", "OFFSET_NOT_KEPT", "OFFSET_AHEAD"})


@dataclass(frozen=True)
class Ask:
    """The next call. delay: seconds to wait before it. request: for Generate, or for Resume where it is one."""

    request: pb.GenerateRequest | pb.ResumeRequest
    delay: float


class Progress:
    """One generation, over all the calls that it takes."""

    def __init__(self, request: pb.GenerateRequest, timeout: float | None) -> None:
        """request: changed here: resumable, and with a seed of its own where it names none. timeout: seconds for all
        calls together. Raises ValueError where it asks for several generations."""
        if request.sampling.n > 1:
            raise ValueError("resume=True is for one generation: n must be 1")
        request.resumable = True
        if not request.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(64)
        self.generation_id = ""
        self.replica = ""
        self.num_resumed = 0  # calls after the first
        self.is_finished = False
        self._request = request
        self._end = None if timeout is None else time.monotonic() + timeout
        self._token_ids: list[int] = []
        self._origin: pb.Origin | None = None
        self._num_failures = 0
        self._is_resuming = False
        self._num_resumes = 0  # tries since the last message

    def first(self) -> pb.GenerateRequest:
        """The first call."""
        return self._request

    def seconds_left(self) -> float | None:
        """The timeout of the next call."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def take(self, chunk: pb.GenerationChunk) -> None:
        """A message has come. Raises HeadraceError where tokens are missing or come twice."""
        if chunk.offset != len(self._token_ids):
            message = f"the stream goes on at token {chunk.offset}, {len(self._token_ids)} are here"
            raise make_error(grpc.StatusCode.DATA_LOSS, message)
        self.generation_id = chunk.generation_id
        self._token_ids += chunk.token_ids
        if chunk.HasField("origin"):
            self._origin = chunk.origin
        self.is_finished = chunk.HasField("finish")
        self._num_failures = 0
        self._num_resumes = 0

    def broken_off(self) -> HeadraceError:
        """What it is when a stream ends without a finish."""
        return make_error(grpc.StatusCode.UNAVAILABLE, "the stream ended before the generation did")

    def after(self, error: HeadraceError) -> Ask:
        """What to do about a failure. Raises it where that is nothing."""
        is_not_kept = self._is_resuming and error.reason in _NOT_KEPT_REASONS
        left = self.seconds_left()
        if not (is_not_kept or _is_broken(error)) or (left is not None and left <= 0):
            raise error
        self._num_failures += 1
        if self._num_failures >= MAX_ATTEMPTS:
            raise error
        if is_not_kept or error.reason:  # it is gone, or its server would say so
            self._num_resumes = _MAX_RESUMES
        self.num_resumed += 1
        self._is_resuming = bool(self.generation_id) and self._num_resumes < _MAX_RESUMES
        self._num_resumes += self._is_resuming
        return Ask(self._next_request(), 0.0 if is_not_kept else self._delay(error))

    def _next_request(self) -> pb.GenerateRequest | pb.ResumeRequest:
        if self._is_resuming:
            return pb.ResumeRequest(generation_id=self.generation_id, next_offset=len(self._token_ids))
        self.replica = ""
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        if self._token_ids and self._origin is not None:
            request.sampling.max_tokens = self._origin.max_tokens
            request.continuation.token_ids.extend(self._token_ids)
            request.continuation.prompt_hash = self._origin.prompt_hash
            request.continuation.model_digest = self._origin.model_digest
            request.continuation.arithmetic = self._origin.arithmetic
        return request

    def _delay(self, error: HeadraceError) -> float:
        """At once the first time; then with a growing, random wait; never before the server wants to be asked again."""
        backoff = 0.0
        if self._num_failures > 1:
            backoff = min(_FIRST_BACKOFF * 2 ** (self._num_failures - 2), _MAX_BACKOFF) * random.uniform(0.5, 1.5)
        delay = max(backoff, error.retry_after or 0.0)
        left = self.seconds_left()
        return delay if left is None else min(delay, left)


def _is_broken(error: HeadraceError) -> bool:
    if error.reason in _FINAL_REASONS:
        return False
    return error.code in _BROKEN_CODES or (error.code in _BROKEN_CODES_WITHOUT_REASON and not error.reason)
