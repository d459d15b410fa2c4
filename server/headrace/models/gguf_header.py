"""Reads and checks everything in a GGUF file that comes before the weights. Called by `gguf.py` alone.

The file is not trusted. A count or a length is believed only after it has been compared with the bytes that are left,
so a small file can neither ask for much memory nor for much time; every rule here answers a class of published attack
on llama.cpp, Ollama or gguf-py (counts, strings, arrays, dimensions, alignment, extents, duplicates, split files).
Format: the GGUF specification, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import re
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from headrace.models.errors import ModelFileError
from headrace.models.files import TensorInfo, clip
from headrace.models.gguf_blocks import TYPE_NAMES, storage_of
from headrace.models.gguf_keys import KeyRule, Kind, rule_for

MAX_KEYS = 65_536
MAX_TENSORS = 100_000
MAX_STRING_BYTES = 16 * 2**20
MAX_KEY_BYTES = 65_535  # GGUF specification
MAX_TENSOR_NAME_BYTES = 64  # GGUF specification, GGML_MAX_NAME
MAX_ELEMENTS = 2**48  # of one tensor: keeps every product far from 2^64
MIN_KEY_RECORD = 8 + 1 + 4 + 1  # a key of one character with a one-byte value
MIN_TENSOR_RECORD = 8 + 1 + 4 + 8 + 4 + 8  # one character, one dimension
DEFAULT_ALIGNMENT = 32

# A number inside a tensor name (blk.17.attn_q.weight) ends up as an index somewhere: five digits at most.
_TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-./]+")
_LONG_NUMBER = re.compile(r"[0-9]{6}")
_KEY = re.compile(r"[!-~]+")

_LEGACY_MAGIC = {b"lmgg": "GGML", b"fmgg": "GGMF", b"tjgg": "GGJT", b"algg": "GGLA"}

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

_STRING, _ARRAY, _BOOL = 8, 9, 7


@dataclass(frozen=True)
class _Scalar:
    """A fixed-size metadata type: how to unpack one, and how numpy sees many."""

    codec: struct.Struct
    dtype: np.dtype[np.generic]
    kind: Kind


def _scalar(code: str, dtype: str, kind: Kind) -> _Scalar:
    return _Scalar(struct.Struct("<" + code), np.dtype(dtype), kind)


_SCALARS: dict[int, _Scalar] = {
    0: _scalar("B", "<u1", "integer"),
    1: _scalar("b", "<i1", "integer"),
    2: _scalar("H", "<u2", "integer"),
    3: _scalar("h", "<i2", "integer"),
    4: _scalar("I", "<u4", "integer"),
    5: _scalar("i", "<i4", "integer"),
    6: _scalar("f", "<f4", "float"),
    _BOOL: _scalar("B", "?", "bool"),
    10: _scalar("Q", "<u8", "integer"),
    11: _scalar("q", "<i8", "integer"),
    12: _scalar("d", "<f8", "float"),
}
_ARRAY_KINDS: dict[Kind, Kind] = {
    "integer": "integer[]",
    "float": "float[]",
    "bool": "bool[]",
    "string": "string[]",
}

Numbers = npt.NDArray[np.generic]


@dataclass(frozen=True)
class StringSpan:
    """Where a string lies in the file."""

    start: int
    end: int


@dataclass(frozen=True)
class StringSpans:
    """Where the strings of an array lie: string i is at starts[i] .. starts[i + 1] - 8 (a length comes between)."""

    starts: array[int]


RawValue = int | float | bool | Numbers | StringSpan | StringSpans


@dataclass(frozen=True)
class TensorEntry:
    """A tensor and the absolute offset of its bytes in the file."""

    info: TensorInfo
    start: int


@dataclass
class Header:
    """All that precedes the weights; strings are still spans of the mapping."""

    metadata: dict[str, RawValue] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)


def read_header(data: mmap.mmap, file_name: str) -> Header:
    """Parse and check the whole header. Raises ModelFileError."""
    cursor = _Cursor(data, file_name)
    _check_magic(cursor)
    num_tensors, num_keys = cursor.u64("tensor count"), cursor.u64("key count")
    cursor.check_count("keys", num_keys, MAX_KEYS, MIN_KEY_RECORD)
    cursor.check_count("tensors", num_tensors, MAX_TENSORS, MIN_TENSOR_RECORD)
    header = Header()
    for _ in range(num_keys):
        _read_key(cursor, header.metadata)
    _refuse_split(cursor, header.metadata)
    alignment = _alignment(cursor, header.metadata)
    cursor.check_count("tensors", num_tensors, MAX_TENSORS, MIN_TENSOR_RECORD)
    for _ in range(num_tensors):
        _read_tensor(cursor, header.tensors, alignment)
    _place_tensors(cursor, header.tensors, alignment)
    return header


class _Cursor:
    """A position in the file that refuses to read past its end."""

    def __init__(self, data: mmap.mmap, file_name: str) -> None:
        self.data = data
        self.size = len(data)
        self.position = 0
        self.file_name = file_name

    def fail(self, problem: str) -> NoReturn:
        raise ModelFileError(f"{self.file_name}: {problem}")

    @property
    def remaining(self) -> int:
        return self.size - self.position

    def skip(self, count: int, what: str) -> int:
        """Step over `count` bytes and return where they began."""
        if count > self.remaining:
            self.fail(f"ends inside {what}: {count} bytes declared, {self.remaining} left")
        start = self.position
        self.position += count
        return start

    def u32(self, what: str) -> int:
        (value,) = _U32.unpack_from(self.data, self.skip(4, what))
        return int(value)

    def u64(self, what: str) -> int:
        (value,) = _U64.unpack_from(self.data, self.skip(8, what))
        return int(value)

    def check_count(self, what: str, count: int, limit: int, min_record: int) -> None:
        if count > limit:
            self.fail(f"declares {count} {what}, more than {limit}")
        if count > self.remaining // min_record:
            self.fail(f"declares {count} {what}, more than its {self.remaining} remaining bytes can hold")

    def span(self, what: str, limit: int) -> StringSpan:
        """Step over a length and its string."""
        length = self.u64(f"the length of {what}")
        if length > limit:
            self.fail(f"{what} has {length} bytes, more than {limit}")
        start = self.skip(length, what)
        return StringSpan(start, self.position)

    def name(self, what: str, limit: int, pattern: re.Pattern[str]) -> str:
        """Read an ASCII name that matches `pattern`."""
        span = self.span(what, limit)
        text = self.data[span.start : span.end].decode("latin-1")
        if not pattern.fullmatch(text):
            self.fail(f"{what} is empty or holds a character that is not allowed: {clip(text)}")
        return text


def _check_magic(cursor: _Cursor) -> None:
    magic = cursor.data[:4]
    if magic in _LEGACY_MAGIC:
        cursor.fail(f"is a legacy {_LEGACY_MAGIC[magic]} file, not GGUF; convert it again")
    if magic != b"GGUF":
        cursor.fail("is not a GGUF file: its first four bytes are not 'GGUF'")
    cursor.skip(4, "the magic")
    version = cursor.u32("the version")
    if version in (2, 3):
        return
    if version & 0xFFFF == 0 and version:
        cursor.fail("is a big-endian GGUF file; only little-endian is read")
    cursor.fail(f"has GGUF version {version}; versions 2 and 3 are read")


def _read_key(cursor: _Cursor, metadata: dict[str, RawValue]) -> None:
    key = cursor.name("a metadata key", MAX_KEY_BYTES, _KEY)
    if key in metadata:
        cursor.fail(f"has the metadata key {clip(key)} twice")
    what = f"the value of {clip(key)}"
    rule = rule_for(key)
    value: RawValue
    number = cursor.u32(f"the type of {clip(key)}")
    if number == _ARRAY:
        element = cursor.u32(f"the element type of {clip(key)}")
        kind = _kind_of(cursor, element, what)
        _check_kind(cursor, _ARRAY_KINDS[kind], rule, what)
        value = _read_strings(cursor, what) if kind == "string" else _read_numbers(cursor, _SCALARS[element], what)
    else:
        kind = _kind_of(cursor, number, what)
        _check_kind(cursor, kind, rule, what)
        value = _read_string(cursor, rule, what) if kind == "string" else _read_scalar(cursor, _SCALARS[number], what)
    if rule is not None:
        _check_range(cursor, value, rule, what)
    metadata[key] = value


def _kind_of(cursor: _Cursor, number: int, what: str) -> Kind:
    if number == _STRING:
        return "string"
    if number == _ARRAY:
        cursor.fail(f"{what} is an array of arrays")
    if number not in _SCALARS:
        cursor.fail(f"{what} has the unknown type {number}")
    return _SCALARS[number].kind


def _check_kind(cursor: _Cursor, kind: Kind, rule: KeyRule | None, what: str) -> None:
    if rule is not None and kind not in rule.kinds:
        cursor.fail(f"{what} is of kind {kind}, where {' or '.join(rule.kinds)} is expected")


def _read_scalar(cursor: _Cursor, scalar: _Scalar, what: str) -> RawValue:
    (value,) = scalar.codec.unpack_from(cursor.data, cursor.skip(scalar.codec.size, what))
    if scalar.kind == "bool":
        if value > 1:
            cursor.fail(f"{what} is the boolean {value}")
        return bool(value)
    return int(value) if scalar.kind == "integer" else float(value)


def _read_string(cursor: _Cursor, rule: KeyRule | None, what: str) -> StringSpan:
    span = cursor.span(what, MAX_STRING_BYTES if rule is None else rule.max_bytes)
    if span.end - span.start <= 2**20:  # a longer one is checked when it is read, like the strings of an array
        decode_utf8(cursor.data, span.start, span.end, f"{cursor.file_name}: {what}")
    return span


def _read_numbers(cursor: _Cursor, scalar: _Scalar, what: str) -> Numbers:
    count = cursor.u64(f"the length of {what}")
    start = cursor.skip(count * scalar.dtype.itemsize, what)
    numbers = np.frombuffer(cursor.data, scalar.dtype, count, start) if count else np.empty(0, scalar.dtype)
    if scalar.kind == "bool" and count and numbers.view(np.uint8).max() > 1:
        cursor.fail(f"{what} holds a boolean that is neither 0 nor 1")
    return numbers


def _read_strings(cursor: _Cursor, what: str) -> StringSpans:
    """Step over an array of strings; the loop is tight, since a vocabulary and its merges hold 100,000 to a million."""
    count = cursor.u64(f"the length of {what}")
    if count > cursor.remaining // 8:
        cursor.fail(f"{what} declares {count} strings, more than its {cursor.remaining} remaining bytes can hold")
    starts = array("Q")
    unpack: Callable[..., tuple[int]] = _U64.unpack_from
    data, size, position, append = cursor.data, cursor.size, cursor.position, starts.append
    for index in range(count):
        text = position + 8
        if text > size:
            cursor.fail(f"ends inside string {index} of {what}")
        append(text)
        (length,) = unpack(data, position)
        position = text + length
        if length > MAX_STRING_BYTES or position > size:
            cursor.fail(f"string {index} of {what} declares {length} bytes, {size - text} are left")
    append(position + 8)
    cursor.position = position
    return StringSpans(starts)


def _check_range(cursor: _Cursor, value: RawValue, rule: KeyRule, what: str) -> None:
    if isinstance(value, bool | StringSpan | StringSpans):
        return
    if isinstance(value, float):
        if not np.isfinite(value):
            cursor.fail(f"{what} is {value}")
        return
    if isinstance(value, int):
        low = high = value
    elif not value.size or value.dtype.kind == "b":
        return
    elif value.dtype.kind == "f":
        if np.isnan(value).any():
            cursor.fail(f"{what} holds a NaN")
        return
    else:
        low, high = int(value.min()), int(value.max())
    if low < rule.low or high > rule.high:
        bad = low if low < rule.low else high
        cursor.fail(f"{what} is {bad}, outside {rule.low}..{rule.high}")


def _refuse_split(cursor: _Cursor, metadata: dict[str, RawValue]) -> None:
    count = metadata.get("split.count", 0)
    if isinstance(count, int) and count > 1:
        cursor.fail(f"is one of {count} parts of a split model; merge them with llama.cpp's gguf-split")


def _alignment(cursor: _Cursor, metadata: dict[str, RawValue]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(value, int) or isinstance(value, bool):
        cursor.fail("general.alignment is not an integer")
    if not 8 <= value <= 65_536 or value & (value - 1):
        cursor.fail(f"general.alignment is {value}; a power of two from 8 to 65536 is expected")
    return value


def _read_tensor(cursor: _Cursor, tensors: dict[str, TensorEntry], alignment: int) -> None:
    name = cursor.name("a tensor name", MAX_TENSOR_NAME_BYTES, _TENSOR_NAME)
    if name in tensors:
        cursor.fail(f"has the tensor {name} twice")
    if _LONG_NUMBER.search(name):
        cursor.fail(f"tensor {name}: a number in the name has more than five digits")
    num_dims = cursor.u32(f"the dimensions of {name}")
    if not 1 <= num_dims <= 4:
        cursor.fail(f"tensor {name} has {num_dims} dimensions; 1 to 4 are expected")
    dims = [cursor.u64(f"the dimensions of {name}") for _ in range(num_dims)]
    elements = 1
    for dim in dims:
        elements *= dim
        if not 1 <= dim <= MAX_ELEMENTS or elements > MAX_ELEMENTS:
            cursor.fail(f"tensor {name} has the impossible dimensions {dims}")
    number = cursor.u32(f"the type of {name}")
    type_name = TYPE_NAMES.get(number)
    storage = storage_of(type_name) if type_name is not None else None
    if type_name is None or storage is None:
        known = f"is of type {type_name}, which is not supported" if type_name else f"has the unknown type {number}"
        cursor.fail(f"tensor {name} {known}")
    if dims[0] % storage.block:  # GGUF lists the fastest dimension first
        cursor.fail(f"tensor {name}: a row of {dims[0]} weights is not a whole number of {type_name} blocks")
    offset = cursor.u64(f"the offset of {name}")
    if offset % alignment:
        cursor.fail(f"tensor {name}: its offset {offset} is not a multiple of {alignment}")
    info = TensorInfo(name, tuple(reversed(dims)), type_name, elements // storage.block * storage.nbytes)
    tensors[name] = TensorEntry(info, offset)


def _place_tensors(cursor: _Cursor, tensors: dict[str, TensorEntry], alignment: int) -> None:
    """Turn offsets into positions in the file; every extent must lie inside it and overlap no other."""
    base = -(-cursor.position // alignment) * alignment
    end_of_previous, previous = base, ""
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        start = base + entry.start
        end = start + entry.info.nbytes
        if end > cursor.size:
            cursor.fail(f"tensor {name} ends at byte {end}, past the end of the file at {cursor.size}")
        if start < end_of_previous:
            cursor.fail(f"tensors {previous} and {name} overlap")
        end_of_previous, previous = end, name
        tensors[name] = TensorEntry(entry.info, start)


def decode_utf8(data: mmap.mmap, start: int, end: int, what: str) -> str:
    """The string at start..end of the mapping. Raises ModelFileError if it is not UTF-8."""
    try:
        return data[start:end].decode("utf-8")
    except UnicodeDecodeError:
        raise ModelFileError(f"{what} is not valid UTF-8") from None
