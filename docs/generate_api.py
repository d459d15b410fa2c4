"""Writes docs/API.md from the comments of protos/headrace/v1 and from the server's error table.

Called by `make docs`; `make check` calls it with --check and fails where the committed page is stale.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "API.md"
PROTOS = ("inference", "models")

# Field numbers of descriptor.proto, which make up the paths of source locations.
FILE_MESSAGE, FILE_ENUM, FILE_SERVICE = 4, 5, 6
MESSAGE_FIELD, MESSAGE_NESTED, MESSAGE_ONEOF = 2, 3, 8
ENUM_VALUE = 2
SERVICE_METHOD = 2

HEADER = """# API

Generated from `protos/headrace/v1` and the server's error table by `make docs`; do not edit.

Generate clients from the `.proto` files with any gRPC tool chain, or ask a running server:
`grpcurl -plaintext 127.0.0.1:50051 describe headrace.v1.InferenceService`.

"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the committed page is stale")
    arguments = parser.parse_args()
    page = HEADER + "\n".join(lines()) + "\n"
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page:
        print("docs/API.md is stale: run `make docs`", file=sys.stderr)
        return 1
    return 0


def lines() -> Iterator[str]:
    """The page below its header, line by line."""
    for file in describe():
        comments = {tuple(place.path): place.leading_comments for place in file.source_code_info.location}
        yield f"## {file.name}"
        yield ""
        for i, service in enumerate(file.service):
            yield from service_lines(service, comments, (FILE_SERVICE, i))
        for i, message in enumerate(file.message_type):
            yield from message_lines(message, comments, (FILE_MESSAGE, i))
        for i, enum in enumerate(file.enum_type):
            yield from enum_lines(enum, comments, (FILE_ENUM, i))
    yield from error_lines()


def describe() -> list[FileDescriptorProto]:
    """The descriptors of our files, comments included."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "set.binpb"
        names = [f"headrace/v1/{name}.proto" for name in PROTOS]
        arguments = [f"-I{ROOT / 'protos'}", "--include_source_info", f"--descriptor_set_out={out}", *names]
        if protoc.main(["protoc", *arguments]) != 0:
            raise SystemExit("protoc failed")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


Comments = dict[tuple[int, ...], str]
PathOf = tuple[int, ...]


def text(comments: Comments, path: PathOf) -> str:
    """A comment as one line of Markdown."""
    return " ".join(comments.get(path, "").split()).replace("|", "\\|")


def service_lines(service: ServiceDescriptorProto, comments: Comments, path: PathOf) -> Iterator[str]:
    yield f"### service {service.name}"
    yield ""
    yield text(comments, path)
    yield ""
    yield "| method | takes | answers | |"
    yield "| --- | --- | --- | --- |"
    for i, method in enumerate(service.method):
        takes = ("stream " if method.client_streaming else "") + short(method.input_type)
        answers = ("stream " if method.server_streaming else "") + short(method.output_type)
        yield f"| `{method.name}` | {takes} | {answers} | {text(comments, (*path, SERVICE_METHOD, i))} |"
    yield ""


def message_lines(message: DescriptorProto, comments: Comments, path: PathOf) -> Iterator[str]:
    yield f"### {message.name}"
    yield ""
    yield text(comments, path)
    yield ""
    if not message.field:
        return
    yield "| field | type | |"
    yield "| --- | --- | --- |"
    for i, field in enumerate(message.field):
        comment = text(comments, (*path, MESSAGE_FIELD, i))
        if field.HasField("oneof_index") and not field.proto3_optional:
            comment = f"*One of `{message.oneof_decl[field.oneof_index].name}`.* {comment}"
        yield f"| `{field.name}` = {field.number} | {field_type(message, field)} | {comment} |"
    yield ""


def enum_lines(enum: EnumDescriptorProto, comments: Comments, path: PathOf) -> Iterator[str]:
    yield f"### enum {enum.name}"
    yield ""
    yield text(comments, path)
    yield ""
    yield "| value | |"
    yield "| --- | --- |"
    for i, value in enumerate(enum.value):
        yield f"| `{value.name}` = {value.number} | {text(comments, (*path, ENUM_VALUE, i))} |"
    yield ""


def field_type(message: DescriptorProto, field: FieldDescriptorProto) -> str:
    """`repeated X`, `map<K, V>`, `optional X` or `X`; messages and enums link to their section."""
    if field.type in (FieldDescriptorProto.TYPE_MESSAGE, FieldDescriptorProto.TYPE_ENUM):
        for nested in message.nested_type:
            if nested.options.map_entry and field.type_name.endswith(f".{nested.name}"):
                key, value = nested.field
                return f"map<{scalar(key)}, {scalar(value)}>"
        name = short(field.type_name)
    else:
        name = scalar(field)
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def scalar(field: FieldDescriptorProto) -> str:
    return FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()


def short(type_name: str) -> str:
    return type_name.rsplit(".", 1)[-1]


def error_lines() -> Iterator[str]:
    """The catalogue of errors, one row a reason."""
    from headrace.server.errors import CATALOGUE

    yield "## Errors"
    yield ""
    yield "Every status but OK carries `google.rpc.ErrorInfo` with domain `headrace.dev` and one of these reasons."
    yield ""
    yield "A retry helps where the last column says so; RetryInfo then says when."
    yield ""
    yield "| reason | code | message | retry |"
    yield "| --- | --- | --- | --- |"
    for kind in sorted(CATALOGUE, key=lambda kind: (kind.code.value[0], kind.reason)):
        retry = "later or elsewhere" if kind.is_retryable else ""
        yield f"| `{kind.reason}` | {kind.code.name} | {kind.message} | {retry} |"
    yield ""


if __name__ == "__main__":
    raise SystemExit(main())
