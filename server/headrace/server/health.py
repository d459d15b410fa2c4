"""grpc.health.v1: Check, Watch and List, from one table of statuses that `app.py` keeps up to date.

grpcio's own async servicer has no List. Names: "" (the whole server), each gRPC service, each model, "liveness". Never
subject to admission: a busy server that fails its probes would be killed for being busy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from headrace.server.errors import DRAINING, SERVICE_NOT_KNOWN, ServerError
from headrace.server.rpc import Call, Implementation

LIVENESS = "liveness"  # SERVING as long as the front end answers at all, also while the model loads or drains
_Status = health_pb2.HealthCheckResponse


class Health:
    """The statuses and who watches them."""

    def __init__(self, names: tuple[str, ...], pool: DescriptorPool) -> None:
        """names: all that Check will know, NOT_SERVING until `set_serving`. pool: where HealthListResponse is found."""
        self._statuses: dict[str, int] = dict.fromkeys(names, _Status.NOT_SERVING)
        self._statuses[LIVENESS] = _Status.SERVING
        self._changed = asyncio.Event()
        self._is_ending = False
        self._response_class = GetMessageClass(pool.FindMessageTypeByName("grpc.health.v1.HealthCheckResponse"))
        self._list_class = GetMessageClass(pool.FindMessageTypeByName("grpc.health.v1.HealthListResponse"))

    def implementations(self) -> dict[str, Implementation]:
        """By method name."""
        return {"Check": self.check, "Watch": self.watch, "List": self.list}

    @property
    def statuses(self) -> Mapping[str, int]:
        """By name; values of HealthCheckResponse.ServingStatus."""
        return self._statuses

    def set_serving(self, is_serving: bool) -> None:
        """Set all names but LIVENESS at once and tell the watchers."""
        status = _Status.SERVING if is_serving else _Status.NOT_SERVING
        statuses = {**dict.fromkeys(self._statuses, status), LIVENESS: _Status.SERVING}
        if statuses == self._statuses:
            return
        self._statuses = statuses
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def end_watches(self) -> None:
        """End all Watch streams: an open one would hold up the server's exit."""
        self._is_ending = True
        self._changed.set()

    async def check(self, request: health_pb2.HealthCheckRequest, call: Call) -> Message:
        """The status of one name. Unknown: NOT_FOUND."""
        status = self._statuses.get(request.service)
        if status is None:
            raise ServerError(SERVICE_NOT_KNOWN)
        return self._response_class(status=status)

    async def watch(self, request: health_pb2.HealthCheckRequest, call: Call) -> None:
        """The status of one name, now and after every change. Unknown: SERVICE_UNKNOWN."""
        last = None
        while not self._is_ending:
            changed = self._changed
            status = self._statuses.get(request.service, _Status.SERVICE_UNKNOWN)
            if status != last:
                await call.write(self._response_class(status=status))
                last = status
            await changed.wait()
        raise ServerError(DRAINING)

    async def list(self, _: Message, call: Call) -> Message:
        """All names."""
        response = self._list_class()
        for name, status in self._statuses.items():
            response.statuses[name].status = status  # type: ignore[attr-defined]
        return response
