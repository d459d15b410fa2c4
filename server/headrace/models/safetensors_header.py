"""Opens one safetensors file: our own limits first, then the official library's judgement, then a mapping of the data.

Called by `safetensors_dir.py` for each file of a model. The library checks the format; what it allows and we do not is
checked here: large headers, many tensors, other dtypes than float ones. Tensors are then read from a mapping of ours,
since the library copies each one and numpy has no bfloat16.
Format: https://github.com/safetensors/safetensors#format
"""

from __future__ import annotations

import json
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from headrace.models.errors import ModelFileError
from headrace.models.files import TensorInfo, clip, map_file
from headrace.models.gguf_blocks import DENSE_BYTES, F32, decode_dense

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_DIMS = 8
_NAME = re.compile(r"[!-~]{1,512}")
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class _Extent:
    info: TensorInfo
    start: int  # in the file


@dataclass(frozen=True)
class SafetensorsFile:
    """One checked and mapped file."""

    data: mmap.mmap
    extents: Mapping[str, _Extent]

    def load(self, name: str) -> F32:
        """A tensor as float32; F32 is a read-only view of the mapping, F16 and BF16 are converted."""
        extent = self.extents[name]
        raw = np.frombuffer(self.data, np.uint8, extent.info.nbytes, extent.start)
        return decode_dense(raw, extent.info.type_name).reshape(extent.info.shape)


def open_file(path: Path) -> SafetensorsFile:
    """Map and check one file. Raises ModelFileError."""
    from safetensors import SafetensorError, safe_open  # who reads GGUF files does without

    data = map_file(path)
    header = _header_bytes(data, path.name)
    try:
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelFileError(f"{path.name}: is not a valid safetensors file: {clip(str(error), 200)}") from None
    entries = parse_json(header, path.name)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise ModelFileError(f"{path.name}: declares {len(entries)} tensors, more than {MAX_TENSORS}")
    base = _LENGTH.size + len(header)
    extents = {name: _extent(name, entry, base, path.name) for name, entry in entries.items()}
    _check_cover(extents, base, len(data), path.name)
    return SafetensorsFile(data, extents)


def parse_json(text: bytes, file_name: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, as a dictionary. Raises ModelFileError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        return result

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except UnicodeDecodeError:
        raise ModelFileError(f"{file_name}: is not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ModelFileError(f"{file_name}: is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{file_name}: is not a JSON object")
    return value


def _header_bytes(data: mmap.mmap, file_name: str) -> bytes:
    if len(data) < _LENGTH.size + 2:
        raise ModelFileError(f"{file_name}: is too short for a safetensors file")
    (length,) = _LENGTH.unpack_from(data)
    if length > MAX_HEADER_BYTES:
        raise ModelFileError(f"{file_name}: declares a header of {length} bytes, more than {MAX_HEADER_BYTES}")
    if length > len(data) - _LENGTH.size:
        raise ModelFileError(f"{file_name}: is truncated: the header has {length} bytes")
    header = data[_LENGTH.size : _LENGTH.size + length]
    if not header.startswith(b"{"):
        raise ModelFileError(f"{file_name}: its header does not begin with '{{'")
    if header.count(b'"data_offsets"') > MAX_TENSORS:  # before anything is built for each of them
        raise ModelFileError(f"{file_name}: declares more than {MAX_TENSORS} tensors")
    return header


def _extent(name: str, entry: dict[str, Any], base: int, file_name: str) -> _Extent:
    """The library has checked that an entry has dtype, shape and data_offsets of the right kinds."""
    if not _NAME.fullmatch(name):
        raise ModelFileError(f"{file_name}: a tensor has the name {clip(name)}, which is not allowed")
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DENSE_BYTES:
        raise ModelFileError(f"{file_name}: tensor {name} is of type {dtype}; F32, F16 and BF16 are read")
    if len(shape) > MAX_DIMS or not all(shape):
        raise ModelFileError(f"{file_name}: tensor {name} has the impossible shape {clip(str(shape))}")
    nbytes = math.prod(shape) * DENSE_BYTES[dtype]
    if end - begin != nbytes:
        raise ModelFileError(f"{file_name}: tensor {name} has {end - begin} bytes, its shape needs {nbytes}")
    return _Extent(TensorInfo(name, tuple(shape), dtype, nbytes), base + begin)


def _check_cover(extents: Mapping[str, _Extent], base: int, size: int, file_name: str) -> None:
    """The tensors must cover the data without a hole or an overlap, to the last byte."""
    position = base
    for extent in sorted(extents.values(), key=lambda extent: extent.start):
        if extent.start != position:
            raise ModelFileError(f"{file_name}: there is a hole or an overlap before tensor {extent.info.name}")
        position += extent.info.nbytes
    if position != size:
        raise ModelFileError(f"{file_name}: the tensors end at byte {position}, the file at {size}")
