"""Builds GGUF files byte by byte, sound or broken in one chosen place, without any GGUF library.

Used by the hostile-file tests and by the mutation fuzz (`fuzz_gguf.py`).
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass, field, replace
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}

# type number and bytes of one block: plain float32, float16, and some quantised types
TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q8_0, TYPE_Q6_K = 0, 1, 2, 8, 14


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def scalar(kind: int, value: Any) -> bytes:
    return string(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def key(name: str | bytes, kind: int, value: Any) -> bytes:
    """A key with a scalar or string value."""
    return string(name) + u32(kind) + scalar(kind, value)


def array_key(name: str, kind: int, values: list[Any], *, count: int | None = None) -> bytes:
    """A key with an array; `count` is declared in place of the true length."""
    body = b"".join(scalar(kind, value) for value in values)
    return string(name) + u32(ARRAY) + u32(kind) + u64(len(values) if count is None else count) + body


@dataclass(frozen=True)
class Tensor:
    """A tensor record; dims with the fastest first, as in the file."""

    name: str | bytes = "blk.0.attn_q.weight"
    dims: tuple[int, ...] = (32, 2)
    type: int = TYPE_F32
    offset: int = 0
    num_dims: int | None = None

    def pack(self) -> bytes:
        count = len(self.dims) if self.num_dims is None else self.num_dims
        return string(self.name) + u32(count) + b"".join(map(u64, self.dims)) + u32(self.type) + u64(self.offset)


@dataclass(frozen=True)
class File:
    """A whole file; the counts are those of the lists unless given."""

    keys: list[bytes] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    num_keys: int | None = None
    num_tensors: int | None = None
    alignment: int = 32

    def pack(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        head = self.magic + u32(self.version) + u64(num_tensors) + u64(num_keys)
        head += b"".join(self.keys) + b"".join(tensor.pack() for tensor in self.tensors)
        return head + b"\0" * (-len(head) % self.alignment) + self.data

    def with_key(self, *keys: bytes) -> File:
        return replace(self, keys=[*self.keys, *keys])

    def with_tensor(self, *tensors: Tensor) -> File:
        return replace(self, tensors=list(tensors))


def sound() -> File:
    """A small file that has one of everything and opens without complaint."""
    return File(
        keys=[
            key("general.architecture", STRING, "llama"),
            key("llama.block_count", U32, 1),
            key("llama.context_length", U32, 128),
            key("llama.attention.layer_norm_rms_epsilon", F32, 1e-5),
            key("tokenizer.ggml.add_bos_token", BOOL, 1),
            key("tokenizer.ggml.bos_token_id", U32, 1),
            key("tokenizer.chat_template", STRING, "{{ messages }}"),
            array_key("tokenizer.ggml.tokens", STRING, ["<s>", "a", "é", "東京"]),
            array_key("tokenizer.ggml.scores", F32, [0.0, -1.0, -2.0, -3.0]),
            array_key("tokenizer.ggml.token_type", I32, [3, 1, 1, 1]),
            array_key("some.flags", BOOL, [0, 1]),
            key("some.signed", I64, -5),
            key("some.double", F64, 0.5),
        ],
        tensors=[
            Tensor("token_embd.weight", (32, 4), TYPE_F32, 0),
            Tensor("blk.0.attn_norm.weight", (32,), TYPE_F32, 512),
            Tensor("blk.0.attn_q.weight", (32, 2), TYPE_Q8_0, 640),
            Tensor("blk.0.attn_k.weight", (32, 2), TYPE_F16, 736),
        ],
        data=bytes(864),
    )


def mapping(data: bytes) -> mmap.mmap:
    """The bytes as an anonymous mapping: what `GGUFFile` takes, without a file."""
    memory = mmap.mmap(-1, len(data))
    memory.write(data)
    return memory
