"""Packed weights in one file that is mapped at the next start: its format, how it is written, and what is checked.

Called by `headrace.models.packed`, which decides where the file lies and whether it still fits its model. The file:

    64 bytes   _PREAMBLE: magic, version, size of the table, where the data begin, size of the file, SHA-256
    table      JSON: what the file was made of (`Origin`), the forms of all matrices, and the entries with their offsets
    data       from a multiple of 4096 on; every entry starts on a multiple of 64 and is used where it lies

The checksum is of the preamble and the table. The data are trusted as the model file beside them is: a file with the
right origin and sizes was written by `PackWriter`, and appeared under its name in one piece.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from headrace.kernels.native.matrix import KINDS, SCALE_KINDS, MatrixSpec, PackedMatrix
from headrace.kernels.native.ops import WeightForm

F32 = npt.NDArray[np.float32]

MAGIC = b"HRPACK\r\n"
VERSION = 2
MAX_TABLE_BYTES = 64 << 20
_PREAMBLE = struct.Struct("<8sIIQQ32s")
_UNSUMMED = _PREAMBLE.size - 32
_PAGE = 4096
_ALIGNMENT = 64
_ENTRY_BYTES = 320  # of JSON for one entry, without its name
_FORM_KINDS = ("int4", "int8", "dense")


class PackedFileError(Exception):
    """A file is not one of packed weights, or is damaged. The message says what is wrong, without the file's name."""


@dataclass(frozen=True)
class SourceFile:
    """A file that the weights came from, as it was then."""

    name: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class Origin:
    """What packed weights were made of. rules: a hash of the code that packs. digest: of the model's files."""

    rules: str
    digest: str
    files: tuple[SourceFile, ...]


@dataclass(frozen=True, eq=False)
class MappedWeights:
    """An open file, mapped read-only. Implements `headrace.kernels.native.executor.PackedWeights`."""

    origin: Origin
    forms: Mapping[str, WeightForm]
    matrices: Mapping[str, PackedMatrix]
    vectors: Mapping[str, F32]


def open_packed(path: Path) -> MappedWeights:
    """Map a file. Raises FileNotFoundError, PackedFileError (whatever the file holds), OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        return _read(fd)
    finally:
        os.close(fd)


def change_origin(path: Path, origin: Origin) -> None:
    """Write another origin into a file whose data are right. Raises OSError, PackedFileError.

    In place: who reads at this very moment may see a wrong checksum, and then packs again.
    """
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        table, data_start, file_bytes = _read_table(fd)
        table["origin"] = asdict(origin)
        os.pwrite(fd, _header(table, data_start, file_bytes), 0)
    finally:
        os.close(fd)


class PackWriter:
    """Writes a file beside its final name and renames it when it is complete: `finish`, or nothing is left.

    names: of all entries to come. Raises OSError wherever the system cannot write.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self._path = path
        # Not the process id: two containers that share a volume have the same.
        self._temporary = path.with_name(f"{path.name}.{os.urandom(6).hex()}.part")
        entries = sum(_ENTRY_BYTES + 14 * len(name) for name in names)  # a name is at most escaped, and there twice
        self._data_start = _round_up(_PREAMBLE.size + 64 * 1024 + entries, _PAGE)
        self._matrices: list[dict[str, Any]] = []
        self._vectors: list[dict[str, Any]] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._temporary, flags, 0o644), "r+b")
        self._end = self._file.seek(self._data_start)

    def add_matrix(self, name: str, matrix: PackedMatrix) -> None:
        """Append a matrix; the array is not needed any more."""
        self._matrices.append({"name": name, **asdict(matrix.spec), "offset": self._append(matrix.data)})

    def add_vector(self, name: str, vector: F32) -> None:
        """Append a float32 array."""
        assert vector.dtype == np.float32
        self._vectors.append(
            {"name": name, "shape": vector.shape, "offset": self._append(np.ascontiguousarray(vector))}
        )

    def finish(self, origin: Origin, forms: Mapping[str, WeightForm]) -> MappedWeights:
        """Complete the file, give it its name, and map it."""
        self._file.write(bytes(_round_up(self._end, _PAGE) - self._end))
        table = {
            "origin": asdict(origin),
            "forms": {name: list(asdict(form).values()) for name, form in forms.items()},
            "matrices": self._matrices,
            "vectors": self._vectors,
        }
        header = _header(table, self._data_start, self._file.tell())
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        weights = _read(self._file.fileno())  # not by name: another process may put its own there now
        os.replace(self._temporary, self._path)
        return weights

    def _append(self, array: npt.NDArray[Any]) -> int:
        offset = _round_up(self._end, _ALIGNMENT)
        self._file.write(bytes(offset - self._end))
        self._file.write(array.reshape(-1).view(np.uint8).data)
        self._end = offset + array.nbytes
        return offset

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        try:
            self._file.close()  # writes what is buffered, and so may fail as well
        finally:
            self._temporary.unlink(missing_ok=True)  # gone already after `finish`


def _header(table: dict[str, Any], data_start: int, file_bytes: int) -> bytes:
    text = json.dumps(table, separators=(",", ":")).encode()
    if _PREAMBLE.size + len(text) > data_start:
        raise PackedFileError("the table does not fit before the data")
    preamble = _PREAMBLE.pack(MAGIC, VERSION, len(text), data_start, file_bytes, b"")[:_UNSUMMED]
    return preamble + _checksum(preamble, text) + text


def _checksum(preamble: bytes, text: bytes) -> bytes:
    return hashlib.sha256(preamble[:_UNSUMMED] + text).digest()


def _read_table(fd: int) -> tuple[dict[str, Any], int, int]:
    """The table, where the data begin, and the size of the file. Raises PackedFileError."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise PackedFileError("is not a regular file")
    preamble = os.pread(fd, _PREAMBLE.size, 0)
    if len(preamble) < _PREAMBLE.size:
        raise PackedFileError("is too short")
    magic, version, table_bytes, data_start, file_bytes, checksum = _PREAMBLE.unpack(preamble)
    if magic != MAGIC:
        raise PackedFileError("does not hold packed weights")
    if version != VERSION:
        raise PackedFileError(f"has version {version}, not {VERSION}")
    if file_bytes != status.st_size:
        raise PackedFileError(f"has {status.st_size} bytes instead of {file_bytes}")
    if table_bytes > MAX_TABLE_BYTES or not _PREAMBLE.size + table_bytes <= data_start <= file_bytes:
        raise PackedFileError("has an impossible header")
    text = os.pread(fd, table_bytes, _PREAMBLE.size)
    if _checksum(preamble, text) != checksum:
        raise PackedFileError("has a header with a wrong checksum")
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        raise PackedFileError("has a table that is not JSON") from None
    if not isinstance(table, dict):
        raise PackedFileError("has a table that is not an object")
    return table, data_start, file_bytes


def _read(fd: int) -> MappedWeights:
    table, data_start, file_bytes = _read_table(fd)
    mapping = mmap.mmap(fd, file_bytes, access=mmap.ACCESS_READ)
    reader = _Reader(mapping, data_start, file_bytes)
    # A table with the right checksum and the wrong contents was not written by us: no more is said about it.
    try:
        return MappedWeights(
            _origin(table["origin"]),
            {_text(name): _form(form) for name, form in table["forms"].items()},
            {_text(entry["name"]): reader.matrix(entry) for entry in table["matrices"]},
            {_text(entry["name"]): reader.vector(entry) for entry in table["vectors"]},
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise PackedFileError(f"has an impossible table: {type(error).__name__}") from None


class _Reader:
    """Makes arrays of a mapping, within its bounds."""

    def __init__(self, mapping: mmap.mmap, data_start: int, file_bytes: int) -> None:
        self._mapping, self._data_start, self._file_bytes = mapping, data_start, file_bytes

    def matrix(self, entry: dict[str, Any]) -> PackedMatrix:
        spec = MatrixSpec(
            kind=_one_of(entry["kind"], KINDS),
            rows=_count(entry["rows"], 2**31),
            cols=_count(entry["cols"], 2**31),
            scale_kind=_one_of(entry["scale_kind"], SCALE_KINDS),
            scales_per_block=_count(entry["scales_per_block"], 2**31),
            has_zeros=_flag(entry["has_zeros"]),
            is_gated=_flag(entry["is_gated"]),
        )
        return PackedMatrix(spec, self._array(entry["offset"], spec.num_bytes))  # which refuses what cannot be

    def vector(self, entry: dict[str, Any]) -> F32:
        shape = tuple(_count(size) for size in entry["shape"])
        if not shape:
            raise ValueError("a number is no vector")
        return self._array(entry["offset"], 4 * math.prod(shape)).view(np.float32).reshape(shape)

    def _array(self, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        if _count(offset) < self._data_start or offset % _ALIGNMENT or num_bytes > self._file_bytes - offset:
            raise ValueError("an entry lies outside of the file")
        return np.frombuffer(self._mapping, np.uint8, num_bytes, offset)


def _origin(origin: dict[str, Any]) -> Origin:
    files = (SourceFile(_text(f["name"]), _count(f["num_bytes"]), int(f["mtime_ns"])) for f in origin["files"])
    return Origin(_text(origin["rules"]), _text(origin["digest"]), tuple(files))


def _form(form: list[Any]) -> WeightForm:
    kind, *flags = form
    has_narrow_groups, has_zeros, is_two_level = (_flag(flag) for flag in flags)
    return WeightForm(_one_of(kind, _FORM_KINDS), has_narrow_groups, has_zeros, is_two_level)


def _one_of(value: object, allowed: tuple[Any, ...]) -> Any:
    if value not in allowed:
        raise ValueError("a word is not known")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not a string")
    return value


def _count(value: object, limit: int = 2**62) -> int:
    if type(value) is not int or not 0 <= value < limit:
        raise TypeError("not a count")
    return value


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError("not a flag")
    return value


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
