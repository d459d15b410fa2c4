"""grpc.reflection, v1 and v1alpha: what lets grpcurl and buf call this server without its protos."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer
from headrace.server.rpc import Call, Implementation


class Reflection:
    """Both versions: their messages are the same on the wire, so v1's are read as v1alpha's."""

    def __init__(self, service_names: Sequence[str], pool: DescriptorPool) -> None:
        self._servicer = ReflectionServicer(service_names, pool=pool)

    def implementations(self) -> dict[str, Implementation]:
        """By method name."""
        return {"ServerReflectionInfo": self.info}

    async def info(self, requests: AsyncIterator[Message], call: Call) -> None:
        """One answer per question."""
        async for request in requests:
            alpha = reflection_pb2.ServerReflectionRequest.FromString(request.SerializeToString())
            async for response in self._servicer.ServerReflectionInfo(_single(alpha), None):
                await call.write(response)


async def _single(message: Message) -> AsyncIterator[Message]:
    yield message
