"""A file of packed weights may hold anything: it is refused, or its arrays lie inside of it. Nothing crashes."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.kernels.native.packed import _PREAMBLE, MappedWeights, PackedFileError, open_packed
from headrace.models.packed import load_packed, pack_path

from tests.conftest import TinyModels


@pytest.fixture(scope="module")
def sound(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    shutil.copy(tiny_models.gguf("llama", "Q4_1"), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_PACK_CACHE", "on")
        load_packed(path)
    return pack_path(path).read_bytes()


def touch_everything(weights: MappedWeights) -> int:
    """Read every byte that C++ would be told of: outside of the mapping this ends the process."""
    total = 0
    for matrix in weights.matrices.values():
        assert matrix.data.nbytes == matrix.spec.num_bytes
        total += int(np.add.reduce(matrix.data, dtype=np.uint64))
    for vector in weights.vectors.values():
        total += int(np.add.reduce(vector.view(np.uint8).ravel(), dtype=np.uint64))
    return total


def try_open(path: Path, data: bytes) -> MappedWeights | None:
    path.write_bytes(data)
    try:
        weights = open_packed(path)
    except PackedFileError:
        return None
    touch_everything(weights)
    return weights


def test_mutated_headers_are_refused(sound: bytes, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    _, _, table_bytes, data_start, _, _ = _PREAMBLE.unpack(sound[: _PREAMBLE.size])
    header_bytes = _PREAMBLE.size + table_bytes
    for trial in range(400):
        mutated = bytearray(sound)
        for _ in range(rng.integers(1, 4)):
            end = _PREAMBLE.size if trial % 2 else header_bytes
            mutated[rng.integers(0, end)] = rng.integers(0, 256)
        if mutated != sound:
            assert try_open(tmp_path / "mutated", bytes(mutated)) is None
    assert try_open(tmp_path / "sound", sound) is not None
    assert data_start % 4096 == 0


def test_truncated_files_are_refused(sound: bytes, tmp_path: Path) -> None:
    for size in [*range(80), 500, 4095, 4096, 70_000, len(sound) // 2, len(sound) - 1]:
        assert try_open(tmp_path / "cut", sound[:size]) is None
    assert try_open(tmp_path / "longer", sound + b"\0") is None


def signed(sound: bytes, table: Any, *, data_start: int | None = None) -> bytes:
    """The file with another table, and the right checksum."""
    magic, version, _, start, size, _ = _PREAMBLE.unpack(sound[: _PREAMBLE.size])
    start = start if data_start is None else data_start
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    preamble = _PREAMBLE.pack(magic, version, len(text), start, size, b"")[:-32]
    head = preamble + hashlib.sha256(preamble + text).digest() + text
    return head + sound[len(head) :]


def table_of(sound: bytes) -> dict[str, Any]:
    size = _PREAMBLE.unpack(sound[: _PREAMBLE.size])[2]
    table: dict[str, Any] = json.loads(sound[_PREAMBLE.size : _PREAMBLE.size + size])
    return table


VALUES: list[Any] = [-1, 0, 1, 63, 64, 2**31 - 1, 2**31, 2**32 + 16, 2**53, 2**63, 2**64, 10**30, 1.5, 1e400]
VALUES += [None, True, "", "int4", "f32", [], [1], {}, {"a": 1}, "x" * 1000]


def test_tables_that_lie_are_refused_or_harmless(sound: bytes, tmp_path: Path) -> None:
    """Someone who knows the format signs a wrong table."""
    rng = np.random.default_rng(1)
    assert try_open(tmp_path / "same", signed(sound, table_of(sound))) is not None
    for part in ("origin", "forms", "matrices", "vectors"):
        for value in VALUES:
            table = table_of(sound)
            table[part] = value
            try_open(tmp_path / "table", signed(sound, table))
        table = table_of(sound)
        del table[part]
        assert try_open(tmp_path / "table", signed(sound, table)) is None
    for _ in range(300):
        table = table_of(sound)
        part = ("matrices", "vectors")[int(rng.integers(2))]
        entry = table[part][int(rng.integers(len(table[part])))]
        key = list(entry)[int(rng.integers(len(entry)))]
        if rng.random() < 0.1:
            del entry[key]
        else:
            entry[key] = VALUES[int(rng.integers(len(VALUES)))]
        try_open(tmp_path / "table", signed(sound, table))


@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"null", b"[1]", b"{}", b"\xff\xfe", b'{"a":' * 50_000])
def test_tables_that_are_none_are_refused(text: bytes, sound: bytes, tmp_path: Path) -> None:
    padded = sound + bytes(1 << 20)
    magic, version, _, _, _, _ = _PREAMBLE.unpack(sound[: _PREAMBLE.size])
    preamble = _PREAMBLE.pack(magic, version, len(text), 1 << 19, len(padded), b"")[:-32]
    head = preamble + hashlib.sha256(preamble + text).digest() + text
    assert try_open(tmp_path / "table", head + padded[len(head) :]) is None


def test_entries_must_lie_among_the_data(sound: bytes, tmp_path: Path) -> None:
    for offset in (0, 64, -64, len(sound), len(sound) - 64, 2**62):
        for part in ("matrices", "vectors"):
            table = table_of(sound)
            table[part][0]["offset"] = offset
            assert try_open(tmp_path / "table", signed(sound, table)) is None
    table = table_of(sound)
    table["matrices"][0]["offset"] += 32  # not aligned
    assert try_open(tmp_path / "table", signed(sound, table)) is None
    table = table_of(sound)
    table["matrices"][0]["rows"] = 2**30
    assert try_open(tmp_path / "table", signed(sound, table)) is None
