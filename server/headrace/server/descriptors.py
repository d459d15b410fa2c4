"""The descriptors of everything this server speaks: what reflection tells and what handlers are registered from.

grpc's own Python packages lag behind the protocol: grpcio-health-checking's health.proto has no List, and
grpcio-reflection has v1alpha only. So this builds a descriptor pool of its own, with the health file completed and
reflection v1 as a copy of v1alpha under its new name (the messages are the same on the wire). The process's default
pool stays as it is.
"""

from __future__ import annotations

from importlib.resources import files

from google.protobuf import descriptor_pb2, duration_pb2
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.rpc import error_details_pb2
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from headrace.v1 import inference_pb2, models_pb2

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1.ServerReflection"
REFLECTION_ALPHA = "grpc.reflection.v1alpha.ServerReflection"
CHANNELZ = "grpc.channelz.v1.Channelz"
INFERENCE = "headrace.v1.InferenceService"
MODELS = "headrace.v1.ModelService"

_String = descriptor_pb2.FieldDescriptorProto.TYPE_STRING
_Message = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE
_OPTIONAL = descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
_REPEATED = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def build_pool() -> DescriptorPool:
    """A pool with all services of the server and what they import."""
    pool = DescriptorPool()
    added: set[str] = set()
    # With the details of errors: grpcurl then prints them instead of base64.
    for module in (inference_pb2, models_pb2, channelz_pb2, reflection_pb2, error_details_pb2, duration_pb2):
        _add(pool, module.DESCRIPTOR, added)
    pool.Add(_health_file())
    for file in _orca_files():
        pool.Add(file)
    pool.Add(_reflection_v1_file())
    return pool


def service(pool: DescriptorPool, name: str) -> ServiceDescriptor:
    """A service by its full name. Raises KeyError."""
    return pool.FindServiceByName(name)


def _add(pool: DescriptorPool, file: FileDescriptor, added: set[str]) -> None:
    if file.name in added:
        return
    added.add(file.name)
    for dependency in file.dependencies:
        _add(pool, dependency, added)
    pool.AddSerializedFile(file.serialized_pb)


def _health_file() -> descriptor_pb2.FileDescriptorProto:
    """health.proto with List, as in grpc-proto: HealthListResponse.statuses is a map from name to response."""
    file = descriptor_pb2.FileDescriptorProto()
    file.ParseFromString(health_pb2.DESCRIPTOR.serialized_pb)
    (health,) = file.service
    if any(method.name == "List" for method in health.method):
        return file
    file.message_type.add(name="HealthListRequest")
    response = file.message_type.add(name="HealthListResponse")
    entry = response.nested_type.add(name="StatusesEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_String, label=_OPTIONAL)
    value = f".{file.package}.HealthCheckResponse"
    entry.field.add(name="value", number=2, type=_Message, label=_OPTIONAL, type_name=value)
    name = f".{file.package}.HealthListResponse.StatusesEntry"
    response.field.add(name="statuses", number=1, type=_Message, label=_REPEATED, type_name=name)
    package = f".{file.package}"
    health.method.add(
        name="List", input_type=f"{package}.HealthListRequest", output_type=f"{package}.HealthListResponse"
    )
    return file


def _orca_files() -> list[descriptor_pb2.FileDescriptorProto]:
    """protos/xds, as `make protos` compiled them."""
    data = files("headrace.v1").joinpath("orca.binpb").read_bytes()
    return list(descriptor_pb2.FileDescriptorSet.FromString(data).file)


def _reflection_v1_file() -> descriptor_pb2.FileDescriptorProto:
    old, new = "grpc.reflection.v1alpha", "grpc.reflection.v1"
    file = descriptor_pb2.FileDescriptorProto()
    file.ParseFromString(reflection_pb2.DESCRIPTOR.serialized_pb)
    file.name = "grpc/reflection/v1/reflection.proto"
    file.package = new
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = field.type_name.replace(f".{old}.", f".{new}.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(f".{old}.", f".{new}.")
        method.output_type = method.output_type.replace(f".{old}.", f".{new}.")
    return file
