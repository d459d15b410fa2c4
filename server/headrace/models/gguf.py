"""The GGUF reader: a memory-mapped file, its metadata and its tensors as weights.

Called by `headrace.models.load` (engine process: weights; front process: metadata only) and by the tokenizer builder.
Opening checks the whole header (`gguf_header.py`) and touches no weight; loading maps a tensor's blocks, without
rounding, onto the one internal form of quantised weights (`gguf_blocks.py`). Imports no torch.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import overload

import numpy as np
from headrace.kernels.quant import Weight
from headrace.models.errors import ModelFileError
from headrace.models.files import TensorInfo, clip, map_file
from headrace.models.gguf_blocks import BLOCK_TYPES, decode_blocks, decode_dense
from headrace.models.gguf_header import (
    Numbers,
    RawValue,
    StringSpan,
    StringSpans,
    TensorEntry,
    decode_utf8,
    read_header,
)

__all__ = ["GGUFFile", "MetaValue", "StringArray", "TensorInfo"]


# Decoded together, but never all of a hostile array.
_STRINGS_AT_ONCE = 4096


class StringArray(Sequence[str]):
    """An array of strings in the file, each decoded when it is asked for. Raises ModelFileError on invalid UTF-8."""

    def __init__(self, data: mmap.mmap, starts: array[int], what: str) -> None:
        self._data = data
        self._starts = starts
        self._what = what

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        return decode_utf8(self._data, self._starts[i], self._starts[i + 1] - 8, f"{self._what}[{i}]")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _STRINGS_AT_ONCE):
            yield from self._run(first, min(first + _STRINGS_AT_ONCE, len(self)))

    def _run(self, first: int, end: int) -> list[str]:
        """Some strings at once: a vocabulary's 100,000 one by one take 0.1 s of every start."""
        starts = self._starts[first : end + 1]
        base = starts[0]
        raw = self._data[base : starts[-1]]
        try:
            return [raw[a - base : b - base - 8].decode() for a, b in pairwise(starts)]
        except UnicodeDecodeError:
            return self[first:end]  # says which


MetaValue = int | float | bool | str | Numbers | StringArray


class _Metadata(Mapping[str, MetaValue]):
    """The key-value part of the header; a string is decoded when it is asked for."""

    def __init__(self, data: mmap.mmap, values: dict[str, RawValue], file_name: str) -> None:
        self._data = data
        self._values = values
        self._file_name = file_name

    def __getitem__(self, key: str) -> MetaValue:
        value = self._values[key]
        what = f"{self._file_name}: the value of {clip(key)}"
        if isinstance(value, StringSpan):
            return decode_utf8(self._data, value.start, value.end, what)
        if isinstance(value, StringSpans):
            return StringArray(self._data, value.starts, what)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


class GGUFFile:
    """An open GGUF file.

    metadata: numbers, booleans and strings; arrays of numbers are read-only numpy views of the mapping, arrays of
              strings decode lazily.
    tensors: in the order of the file.
    """

    metadata: Mapping[str, MetaValue]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, data: mmap.mmap, file_name: str) -> None:
        header = read_header(data, file_name)
        self._data: mmap.mmap | None = data
        self._file_name = file_name
        self._entries: dict[str, TensorEntry] = header.tensors
        self.metadata = _Metadata(data, header.metadata, file_name)
        self.tensors = MappingProxyType({name: entry.info for name, entry in header.tensors.items()})

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file and check its header. Raises ModelFileError."""
        path = Path(path)
        return cls(map_file(path), path.name)

    def load(self, name: str) -> Weight:
        """One tensor: a `QuantTensor` for a quantised matrix, else float32 in numpy order.

        F32 is a read-only view of the mapping; F16, BF16 and one-dimensional quantised tensors are converted.
        Raises ModelFileError: no such tensor, a scale that is not finite, a quantised tensor of 3 or 4 dimensions.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ModelFileError(f"{self._file_name}: has no tensor {clip(name)}")
        assert self._data is not None, "the file is closed"
        info = entry.info
        raw = np.frombuffer(self._data, np.uint8, info.nbytes, entry.start)
        if info.type_name not in BLOCK_TYPES:
            return decode_dense(raw, info.type_name).reshape(info.shape)
        if len(info.shape) > 2:
            raise ModelFileError(
                f"{self._file_name}: tensor {name} is {info.type_name} with {len(info.shape)} dimensions; "
                "a quantised tensor is a matrix"
            )
        cols = info.shape[-1]
        matrix = decode_blocks(raw, info.type_name, rows=info.shape[0] if len(info.shape) == 2 else 1, cols=cols)
        if matrix is None:
            raise ModelFileError(f"{self._file_name}: tensor {name} holds a scale that is not finite")
        return matrix if len(info.shape) == 2 else matrix.dequantize().reshape(cols)

    def close(self) -> None:
        """Let go of the mapping; it lives on as long as a view of it (an F32 tensor, the metadata) does. Idempotent."""
        self._data = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()
