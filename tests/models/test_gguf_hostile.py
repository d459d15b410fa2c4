"""Corrupt and hostile GGUF files: each ends in a ModelFileError that names the file and the fault, at a small cost.

The classes are those of the published attacks on llama.cpp, Ollama and gguf-py (a count, a length or an offset that is
believed). Cost is measured as memory at its peak and processor time, the latter with a wide margin: what it guards
against is a hang.
"""

from __future__ import annotations

import os
import re
import socket
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from headrace.models.errors import ModelFileError
from headrace.models.gguf import GGUFFile
from headrace.models.gguf_blocks import BLOCK_TYPES, DENSE_BYTES, TYPE_NAMES

from tests.models import gguf_builder as b
from tests.models.gguf_builder import File, Tensor, array_key, key, sound

KIB = 1024


def bomb() -> bytes:
    """133 bytes that declare an array of 2^30 integers: gguf 0.19.0 works on it for more than 12 s."""
    file = File([array_key("general.array.bomb", b.I32, [], count=2**30)])
    return file.pack().ljust(133, b"\0")


def one(tensor: Tensor, data: bytes = bytes(KIB)) -> bytes:
    return File(tensors=[tensor], data=data).pack()


def two(first: Tensor, second: Tensor) -> bytes:
    return File(tensors=[first, second], data=bytes(KIB)).pack()


def with_key(*keys: bytes) -> bytes:
    return sound().with_key(*keys).pack()


def only_key(*keys: bytes, pad: int = 0) -> bytes:
    return File(list(keys)).pack() + bytes(pad)


HOSTILE: dict[str, tuple[bytes, str]] = {
    # the first bytes
    "not GGUF": (b"GGUG" + bytes(60), "not a GGUF file"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
    "legacy GGML": (b"lmgg" + bytes(60), "legacy GGML"),
    "legacy GGJT": (b"tjgg" + bytes(60), "legacy GGJT"),
    "version 0": (replace(sound(), version=0).pack(), "GGUF version 0"),
    "version 1": (replace(sound(), version=1).pack(), "GGUF version 1"),
    "version 4": (replace(sound(), version=4).pack(), "GGUF version 4"),
    "big-endian": (replace(sound(), version=3 << 24).pack(), "big-endian"),
    # counts
    "100 million keys in 24 bytes": (File(num_keys=10**8).pack(), "declares 100000000 keys"),
    "2^64 - 1 keys": (File(num_keys=2**64 - 1).pack(), "keys, more than"),
    "60,000 keys in a small file": (File(num_keys=60_000).pack(), "more than its 8 remaining bytes"),
    "65,537 keys in a file that could hold them": (
        File(num_keys=65_537, data=bytes(65_537 * 14)).pack(), "declares 65537 keys, more than 65536"
    ),
    "100,001 tensors in a file that could hold them": (
        File(num_tensors=100_001, data=bytes(100_001 * 33)).pack(), "declares 100001 tensors, more than 100000"
    ),
    "2^64 - 1 tensors": (File(num_tensors=2**64 - 1).pack(), "tensors, more than"),
    "90,000 tensors in a small file": (File(num_tensors=90_000).pack(), "more than its 8 remaining bytes"),
    "one key more than there are": (replace(sound(), num_keys=14).pack(), "a tensor name has"),
    "one tensor more than there are": (replace(sound(), num_tensors=5).pack(), "tensor name"),
    # keys and strings
    "key length 2^63": (File([b.u64(2**63) + bytes(32)], num_keys=1).pack(), "more than 65535"),
    "key longer than the file": (File([b.u64(60_000) + bytes(32)], num_keys=1).pack(), "ends inside a metadata key"),
    "empty key": (with_key(key("", b.U32, 1)), "a metadata key is empty"),
    "key with a line break": (with_key(key("a\nlevel=INFO forged", b.U32, 1)), r"'a\\nlevel=INFO forged'"),
    "key with a NUL": (with_key(key("a\0b", b.U32, 1)), "not allowed"),
    "the same key twice": (with_key(key("llama.block_count", b.U32, 1)), "'llama.block_count' twice"),
    "string length 2^64 - 1": (only_key(b.string("k") + b.u32(b.STRING) + b.u64(2**64 - 1), pad=64), "more than 167"),
    "string longer than the file": (only_key(b.string("k") + b.u32(b.STRING) + b.u64(2**20)), "ends inside the value"),
    "string that is not UTF-8": (with_key(key("k", b.STRING, b"\xff\xfe")), "not valid UTF-8"),
    "chat template of 65 KiB": (
        sound().with_key(key("tokenizer.chat_template.tool", b.STRING, "x" * 65 * KIB)).pack(),
        "has 66560 bytes, more than 65536",
    ),
    "value of type 13": (with_key(b.string("k") + b.u32(13) + bytes(8)), "unknown type 13"),
    "value of type 2^32 - 1": (with_key(b.string("k") + b.u32(2**32 - 1) + bytes(8)), "unknown type 4294967295"),
    "boolean 2": (with_key(key("k", b.BOOL, 2)), "boolean 2"),
    # arrays
    "the 133-byte array bomb": (bomb(), "ends inside the value of 'general.array.bomb'"),
    "array of 2^61 doubles (size wraps)": (only_key(array_key("k", b.F64, [0.0], count=2**61)), "ends inside the v"),
    "array of 2^64 - 1 bytes": (only_key(array_key("k", b.U8, [0], count=2**64 - 1)), "ends inside the value"),
    "array of 2^40 strings": (only_key(array_key("k", b.STRING, ["a"], count=2**40)), "declares 1099511627776 strings"),
    "array with a string past the end": (
        only_key(array_key("k", b.STRING, ["a"], count=2) + b.u64(2**20)), "string 1 of the value of 'k' declares"
    ),
    "array with a string of 2^64 - 1": (
        only_key(array_key("k", b.STRING, ["a"], count=2) + b.u64(2**64 - 1)), "string 1 of the value of 'k' declares"
    ),
    "array with one string too few": (
        File([array_key("k", b.STRING, ["a" * 9, "b", "c"], count=4)], alignment=1).pack(), "ends inside string 3 of"
    ),
    "array of arrays": (with_key(b.string("k") + b.u32(b.ARRAY) + b.u32(b.ARRAY) + bytes(64)), "array of arrays"),
    "array of type 99": (with_key(b.string("k") + b.u32(b.ARRAY) + b.u32(99) + bytes(64)), "unknown type 99"),
    "array with a boolean 7": (with_key(array_key("k", b.BOOL, [1, 7])), "neither 0 nor 1"),
    # known keys of the wrong kind or out of range
    "tokens as numbers": (only_key(array_key("tokenizer.ggml.tokens", b.I32, [1])), r"kind integer\[\], where string"),
    "scores as int8": (only_key(array_key("tokenizer.ggml.scores", b.I8, [1])), r"kind integer\[\], where float"),
    "token types as float": (only_key(array_key("tokenizer.ggml.token_type", b.F32, [1.0])), "where integer"),
    "token type 300": (only_key(array_key("tokenizer.ggml.token_type", b.I32, [1, 300])), "is 300, outside 0..255"),
    "score NaN": (only_key(array_key("tokenizer.ggml.scores", b.F32, [float("nan")])), "holds a NaN"),
    "merges as a string": (only_key(key("tokenizer.ggml.merges", b.STRING, "a b")), r"where string\[\] is expected"),
    "chat template as an array": (only_key(array_key("tokenizer.chat_template", b.STRING, ["x"])), "where string is"),
    "end token -2": (only_key(key("tokenizer.ggml.eos_token_id", b.I32, -2)), "is -2, outside"),
    "end token as a list": (only_key(array_key("tokenizer.ggml.eos_token_id", b.I32, [2])), "where integer is"),
    "block count 0": (only_key(key("llama.block_count", b.U32, 0)), "is 0, outside 1..4096"),
    "block count 2^31": (only_key(key("qwen2.block_count", b.U32, 2**31)), "outside 1..4096"),
    "block count as a string": (only_key(key("llama.block_count", b.STRING, "30")), "kind string, where integer"),
    "head count 0": (only_key(key("llama.attention.head_count", b.U32, 0)), "is 0, outside"),
    "head count 0 in one layer": (only_key(array_key("gemma3.attention.head_count", b.I32, [4, 0])), "is 0, outside"),
    "embedding length -5": (only_key(key("llama.embedding_length", b.I64, -5)), "is -5, outside"),
    "epsilon NaN": (only_key(key("llama.attention.layer_norm_rms_epsilon", b.F32, float("nan"))), "is nan"),
    "rope base infinite": (only_key(key("llama.rope.freq_base", b.F32, float("inf"))), "is inf"),
    # alignment and split files
    "alignment 0": (only_key(key("general.alignment", b.U32, 0)), "alignment is 0"),
    "alignment 4": (only_key(key("general.alignment", b.U32, 4)), "alignment is 4"),
    "alignment 48": (only_key(key("general.alignment", b.U32, 48)), "alignment is 48"),
    "alignment 2^31": (only_key(key("general.alignment", b.U32, 2**31)), "alignment is 2147483648"),
    "alignment as a string": (only_key(key("general.alignment", b.STRING, "32")), "alignment is not an integer|kind"),
    "split into 2": (only_key(key("split.count", b.U16, 2)), "one of 2 parts"),
    "split into 2^16 - 1": (only_key(key("split.count", b.U16, 65535)), "one of 65535 parts"),
    "split count as a path": (only_key(key("split.count", b.STRING, "/etc/passwd")), "kind string, where integer"),
    # tensors
    "empty tensor name": (one(Tensor(name="")), "a tensor name is empty"),
    "tensor name of 65 bytes": (one(Tensor(name="x" * 65)), "has 65 bytes, more than 64"),
    "tensor name with an escape": (one(Tensor(name="\x1b[2Jgone")), "not allowed"),
    "tensor name that is not ASCII": (one(Tensor(name="blk.é")), "not allowed"),
    "tensor name with the index 2^30": (one(Tensor(name="direction.1073741824")), "more than five digits"),
    "tensor name twice": (two(Tensor("w", (8,)), Tensor("w", (8,), offset=32)), "has the tensor w twice"),
    "no dimensions": (one(Tensor(dims=())), "has 0 dimensions"),
    "5 dimensions": (one(Tensor(dims=(2,) * 5)), "has 5 dimensions"),
    "2^32 - 1 dimensions": (one(Tensor(num_dims=2**32 - 1)), "has 4294967295 dimensions"),
    "dimension 0": (one(Tensor(dims=(32, 0))), r"impossible dimensions \[32, 0\]"),
    "dimension 2^64 - 1 (negative)": (one(Tensor(dims=(2**64 - 1,))), "impossible dimensions"),
    "product wraps to 0": (one(Tensor(dims=(2**32, 2**32))), "impossible dimensions"),
    "product wraps to 32": (one(Tensor(dims=(2**32, 2**32 + 1, 32))), "impossible dimensions"),
    "2^40 weights in a small file": (one(Tensor(dims=(2**20, 2**20))), "past the end of the file"),
    "row that is half a block": (one(Tensor(dims=(48, 2), type=b.TYPE_Q8_0)), "not a whole number of Q8_0 blocks"),
    "row of 32 for a K-quant": (one(Tensor(dims=(32, 8), type=b.TYPE_Q6_K)), "not a whole number of Q6_K blocks"),
    "type 42": (one(Tensor(type=42)), "unknown type 42"),
    "type 2^32 - 1": (one(Tensor(type=2**32 - 1)), "unknown type 4294967295"),
    "offset not aligned": (one(Tensor(offset=8)), "offset 8 is not a multiple of 32"),
    "offset past the end": (one(Tensor(offset=32 * KIB)), "past the end of the file"),
    "offset 2^64 - 32 (wraps)": (one(Tensor(offset=2**64 - 32)), "past the end of the file"),
    "last byte past the end": (one(Tensor(dims=(8,)), bytes(31)), "past the end of the file"),
    "two tensors in one place": (two(Tensor("a", (8,)), Tensor("b", (8,))), "tensors a and b overlap"),
    "a tensor inside another": (two(Tensor("a", (64,)), Tensor("b", (8,), offset=32)), "tensors a and b overlap"),
    "overlap by the last row": (two(Tensor("b", (9,), offset=32), Tensor("a", (17,))), "tensors a and b overlap"),
}  # fmt: skip


def refusal(path: Path, size: int) -> str:
    """Open a file that must be refused, within bounds of memory and processor time; the message."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(ModelFileError) as caught:
            GGUFFile.open(path)
        spent = time.process_time() - started
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 2 * size + 256 * KIB
    assert spent < 1.0
    return str(caught.value)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_at_small_cost(case: str, tmp_path: Path) -> None:
    data, expected = HOSTILE[case]
    path = tmp_path / "evil.gguf"
    path.write_bytes(data)
    message = refusal(path, len(data))
    assert message.startswith("evil.gguf: ")
    assert str(tmp_path) not in message
    assert message.isprintable()
    assert len(message) < 400
    assert re.search(expected, message), message


def test_the_sound_file_that_the_hostile_ones_derive_from_opens(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(sound().pack())
    with GGUFFile.open(path) as file:
        assert len(file.metadata) == 13
        for name in file.tensors:
            file.load(name)


def test_the_bomb_is_133_bytes() -> None:
    assert len(bomb()) == 133


@pytest.mark.parametrize(
    ("number", "name"), [(n, t) for n, t in TYPE_NAMES.items() if t not in BLOCK_TYPES and t not in DENSE_BYTES]
)
def test_every_other_ggml_type_is_refused_by_its_name(number: int, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(one(Tensor("w", (256,), number)))
    with pytest.raises(ModelFileError, match=rf"tensor w is of type {name}, which is not supported"):
        GGUFFile.open(path)


def test_the_numbers_of_the_types_are_ggmls() -> None:
    assert {t.value: t.name for t in gguf.GGMLQuantizationType}.items() <= TYPE_NAMES.items()


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = sound().pack()
    # The file ends with its last tensor's last byte, so that every cut takes something away.
    path = tmp_path / "cut.gguf"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ModelFileError, match=r"^cut\.gguf: "):
            GGUFFile.open(path)


def test_a_quantised_tensor_of_three_dimensions_is_refused_when_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(one(Tensor("experts", (32, 2, 2), b.TYPE_Q8_0)))
    with GGUFFile.open(path) as file, pytest.raises(ModelFileError, match="tensor experts is Q8_0 with 3 dimensions"):
        file.load("experts")


def test_a_vocabulary_token_that_is_not_utf8_is_named_when_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(only_key(array_key("tokenizer.ggml.tokens", b.STRING, ["a", b"\xc3", "b"])))
    tokens = GGUFFile.open(path).metadata["tokenizer.ggml.tokens"]
    with pytest.raises(
        ModelFileError, match=r"model\.gguf: the value of 'tokenizer\.ggml\.tokens'\[1\] is not valid UTF-8"
    ):
        list(tokens)  # type: ignore[arg-type]


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "directory.gguf").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        listener.bind(str(tmp_path / "socket.gguf"))
        (tmp_path / "link.gguf").symlink_to("/dev/zero")
        (tmp_path / "empty.gguf").touch()
        for name, problem in {
            "pipe.gguf": "is not a regular file",
            "directory.gguf": "is not a regular file",
            "socket.gguf": "cannot be opened",
            "link.gguf": "is not a regular file",
            "empty.gguf": "is empty",
            "absent.gguf": "no such file",
            "nul\0.gguf": "not a usable file name",
            "x" * 300 + ".gguf": "File name too long",
        }.items():
            with pytest.raises(ModelFileError, match=problem) as caught:
                GGUFFile.open(tmp_path / name)
            assert str(tmp_path) not in str(caught.value)
