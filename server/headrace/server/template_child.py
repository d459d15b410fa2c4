"""The process that renders chat templates; started by `template_worker` as `python -m headrace.server.template_child`.

A template is foreign code. Here it has no more than this process: one pipe in, one pipe out, bounded memory, bounded
processor time per render, no files, no children. It ends when its parent closes the pipe or dies.

Frames are a 4-byte little-endian length and a MessagePack body: first a `Setup`, answered by
`Ready`, then `Render` after `Render`, each answered by `Rendered` or `Failed`.
"""

import ctypes
import math
import os
import resource
import signal
import struct
import sys
from contextlib import suppress
from typing import TypeVar

import msgspec
from headrace.models.chat_template import ChatTemplate, MessagesRefusedError
from headrace.models.errors import TemplateError

HEADER = struct.Struct("<I")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_IN, _OUT = 0, 1
_Message = TypeVar("_Message")


class Setup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    bos_token: str
    eos_token: str
    max_output_chars: int
    max_memory_bytes: int  # on top of what the process has when it is ready
    max_cpu_seconds: float  # per render
    parent: int  # process id


class Render(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: list[dict[str, str]]
    add_generation_prompt: bool


class Ready(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """The template is compiled, if it can be; a fault in it shows when it is rendered."""


class Rendered(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    text: str


class Failed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    reason: str
    is_refusal: bool  # the template refused the messages; nothing is wrong with it


def main() -> None:
    setup = _receive(Setup)
    if setup is None:
        return
    _die_with(setup.parent)
    _import_what_is_imported_late()
    _confine(setup.max_memory_bytes)
    template = ChatTemplate(setup.source, setup.bos_token, setup.eos_token, max_output_chars=setup.max_output_chars)
    with suppress(TemplateError):
        template.compile()
    _send(Ready())
    while (request := _receive(Render)) is not None:
        _allow_cpu_seconds(setup.max_cpu_seconds)
        _send(_answer(template, request))


def _answer(template: ChatTemplate, request: Render) -> Rendered | Failed:
    try:
        return Rendered(template.render(request.messages, request.add_generation_prompt))
    except TemplateError as error:
        return Failed(str(error), isinstance(error, MessagesRefusedError))


def _die_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit()


def _import_what_is_imported_late() -> None:
    """Python and Jinja load some modules and files on first use; afterwards no file can be opened."""
    used = "{{ '\\n' }}{{ messages | pprint }}{{ messages | tojson }}{{ strftime_now('%B') }}"
    ChatTemplate(used, "", "").render([], False)
    for faulty in ("{{ raise_exception('') }}", "{% if %}"):
        with suppress(TemplateError):
            ChatTemplate(faulty, "", "").render([], False)


def _confine(max_memory_bytes: int) -> None:
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: mapped + max_memory_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def _allow_cpu_seconds(seconds: float) -> None:
    """Moves the limit ahead of what is used so far; the kernel kills the process (SIGXCPU) when it is reached."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def _receive(kind: type[_Message]) -> _Message | None:
    header = _read(HEADER.size)
    if header is None:
        return None
    body = _read(HEADER.unpack(header)[0])
    return None if body is None else msgspec.msgpack.decode(body, type=kind)


def _read(size: int) -> bytes | None:
    """Exactly `size` bytes, None when the parent has closed the pipe."""
    data = bytearray()
    while len(data) < size:
        part = os.read(_IN, min(size - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)


def _send(message: Ready | Rendered | Failed) -> None:
    body = msgspec.msgpack.encode(message)
    data = memoryview(HEADER.pack(len(body)) + body)
    while data:
        data = data[os.write(_OUT, data) :]


if __name__ == "__main__":
    main()
