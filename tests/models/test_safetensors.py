"""Hugging Face directories: sound ones are read exactly, and every way to break or abuse one is refused by name."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.models.errors import ModelError, ModelFileError, UnsupportedModelError
from headrace.models.safetensors_dir import SafetensorsDir, TensorInfo
from safetensors.numpy import save_file

Header = dict[str, Any]


def tensor(dtype: str, shape: list[int], begin: int, end: int) -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Header | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file; `length` is declared in place of the header's true length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


SOUND = {"w": tensor("F32", [2, 3], 0, 24), "v": tensor("F16", [4], 24, 32)}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a config.json and no weights yet, and a secret beside it."""
    (tmp_path / "secret").write_text("secret")
    home = tmp_path / "model"
    home.mkdir()
    (home / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    return home


def put(directory: Path, data: bytes, name: str = "model.safetensors") -> None:
    (directory / name).write_bytes(data)


def test_every_type_is_read_as_float32(directory: Path) -> None:
    bfloat = np.arange(2**16, dtype=np.uint16)
    half = np.arange(0x7C00, dtype=np.uint16)
    single = np.random.default_rng(0).standard_normal((5, 7), dtype=np.float32)
    header: Header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, dtype, values in (("b", "BF16", bfloat.reshape(256, 256)), ("h", "F16", half), ("s", "F32", single)):
        header[name] = tensor(dtype, list(values.shape), len(data), len(data) + values.nbytes)
        data += values.tobytes()
    put(directory, pack(header, data))
    with SafetensorsDir.open(directory) as model:
        assert model.config == {"model_type": "llama", "hidden_size": 8}
        assert model.tensors["b"] == TensorInfo("b", (256, 256), "BF16", 2**17)
        assert set(model.tensors) == {"b", "h", "s"}
        loaded = {name: model.load(name) for name in model.tensors}
    assert all(array.dtype == np.float32 for array in loaded.values())
    np.testing.assert_array_equal(loaded["b"].view(np.uint32).ravel(), bfloat.astype(np.uint32) << 16)
    np.testing.assert_array_equal(loaded["h"], half.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(loaded["s"], single)
    assert not loaded["s"].flags.writeable  # a view of the mapping, which outlives the directory object


def shard(directory: Path, weight_map: dict[str, str], files: dict[str, list[str]]) -> None:
    """An index, and shards that hold the named tensors, each with its own value."""
    for number, (file, names) in enumerate(files.items()):
        save_file(
            {name: np.full((2, 2), 10 * number + i, np.float32) for i, name in enumerate(names)}, directory / file
        )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_sharded_model_is_read_from_the_file_that_the_index_names(directory: Path) -> None:
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shard(directory, {"a": one, "b": two, "c": two}, {one: ["a", "b"], two: ["b", "c"]})
    with SafetensorsDir.open(directory) as model:
        assert [model.load(name)[0, 0] for name in "abc"] == [0, 10, 11]
        with pytest.raises(ModelFileError, match="has no tensor 'd'"):
            model.load("d")


def test_a_model_written_by_transformers_is_read_as_it_reads_it(tiny_llama_dir: Path) -> None:
    from safetensors.numpy import load_file

    expected = load_file(tiny_llama_dir / "model.safetensors")
    with SafetensorsDir.open(tiny_llama_dir) as model:
        assert set(model.tensors) == set(expected)
        for name, values in expected.items():
            np.testing.assert_array_equal(model.load(name), values.astype(np.float32))


def test_links_into_the_blobs_of_the_hub_cache_are_followed_and_no_others(directory: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "abc", tmp_path / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "1").write_bytes(pack(SOUND, bytes(32)))
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    assert SafetensorsDir.open(snapshot).load("w").shape == (2, 3)
    # The same link from a directory that is no snapshot, and a snapshot's link to elsewhere.
    (directory / "model.safetensors").symlink_to(blobs / "1")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(tmp_path / "secret")
    for home, name in ((directory, "model.safetensors"), (snapshot, "config.json")):
        with pytest.raises(ModelFileError, match=rf"'{name}': is a link that leads out of the model directory"):
            SafetensorsDir.open(home)


BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "seven bytes": (bytes(7), "too short"),
    "no header": (struct.pack("<Q", 0) + bytes(8), "does not begin with|valid"),
    "header of 17 MiB declared": (pack({}, length=17 * 2**20), "header of 17825792 bytes, more than 16777216"),
    "header of 2^64 - 1 bytes declared": (pack({}, length=2**64 - 1), "more than 16777216"),
    "header longer than the file": (pack(SOUND, length=1000), "is truncated"),
    "header cut short": (pack(SOUND, bytes(32), length=20), "not a valid safetensors file"),
    "array at the top": (pack(b"[1, 2]  "), "does not begin with"),
    "not JSON": (pack(b"{]      "), "not a valid safetensors file"),
    "header that is not UTF-8": (pack(b'{"\xff": 1}'), "not a valid safetensors file"),
    "nested 100,000 deep": (pack(b'{"a":' * 100_000), "not a valid safetensors file"),
    "the same tensor twice": (
        pack(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
             bytes(4)), "twice|not a valid"
    ),
    "entry without a dtype": (pack({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "not a valid"),
    "shape of -1": (pack({"w": tensor("F32", [-1], 0, 4)}, bytes(4)), "not a valid"),
    "shape of 1.5": (pack(b'{"w":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}', bytes(4)), "not a valid"),
    "shape that is true": (pack(b'{"w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', bytes(4)), "not a valid"),
    "dimension 0": (pack({"w": tensor("F32", [0, 4], 0, 0)}), "impossible shape"),
    "9 dimensions": (pack({"w": tensor("F32", [1] * 9, 0, 4)}, bytes(4)), "impossible shape"),
    "shape whose size wraps": (pack({"w": tensor("F32", [2**32, 2**32], 0, 0)}), "not a valid"),
    "fewer bytes than the shape needs": (pack({"w": tensor("F32", [4], 0, 12)}, bytes(12)), "not a valid"),
    "type I64": (pack({"w": tensor("I64", [1], 0, 8)}, bytes(8)), "tensor w is of type I64; F32, F16 and BF16"),
    "type F8_E4M3": (pack({"w": tensor("F8_E4M3", [4], 0, 4)}, bytes(4)), "tensor w is of type F8_E4M3"),
    "type that does not exist": (pack({"w": tensor("X99", [1], 0, 4)}, bytes(4)), "not a valid"),
    "tensor past the end": (pack({"w": tensor("F32", [4], 0, 16)}, bytes(8)), "not a valid"),
    "offsets backwards": (pack({"w": tensor("F32", [1], 4, 0)}, bytes(4)), "not a valid"),
    "two tensors in one place": (
        pack({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 0, 4)}, bytes(4)), "not a valid"
    ),
    "a hole between tensors": (
        pack({"a": tensor("F32", [1], 0, 4), "b": tensor("F32", [1], 8, 12)}, bytes(12)), "not a valid"
    ),
    "bytes after the last tensor": (pack({"w": tensor("F32", [1], 0, 4)}, bytes(8)), "not a valid"),
    "tensor name with a line break": (pack({"a\nb": tensor("F32", [1], 0, 4)}, bytes(4)), r"name 'a\\nb'"),
    "tensor name that is empty": (pack({"": tensor("F32", [1], 0, 4)}, bytes(4)), "name ''"),
    "metadata that is not text": (pack({"__metadata__": {"a": 1}, **SOUND}, bytes(32)), "not a valid"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_weight_file_is_refused(case: str, directory: Path) -> None:
    data, expected = BAD_FILES[case]
    put(directory, data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            SafetensorsDir.open(directory)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("model.safetensors: ")
    assert re.search(expected, message), message
    assert str(directory) not in message
    assert message.isprintable()
    assert peak < 2 * len(data) + 2**18


def test_more_than_100_000_tensors_are_refused_before_they_are_parsed(directory: Path) -> None:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    put(directory, pack(("{" + ",".join(entry % i for i in range(100_001)) + "}").encode()))
    with pytest.raises(ModelFileError, match="more than 100000 tensors"):
        SafetensorsDir.open(directory)


def test_a_file_cut_at_any_byte_is_refused(directory: Path) -> None:
    data = pack(SOUND, bytes(32))
    for size in range(len(data)):
        put(directory, data[:size])
        with pytest.raises(ModelFileError, match=r"^model\.safetensors: "):
            SafetensorsDir.open(directory)
    put(directory, data)
    SafetensorsDir.open(directory)


def opens(directory: Path) -> bool:
    """Whether all of a model can be loaded; anything but a ModelFileError passes through."""
    try:
        with SafetensorsDir.open(directory) as model:
            for name in model.tensors:
                model.load(name)
    except ModelFileError:
        return False
    return True


def test_mutated_files_open_or_are_refused(directory: Path) -> None:
    """2,000 files with one to three faults in their header: wrong values at every place, and bytes changed or gone."""
    edges: list[Any] = [
        0,
        1,
        -1,
        3,
        24,
        32,
        2**31,
        2**63,
        2**64,
        1.5,
        "F32",
        "F64",
        "BF16",
        "",
        None,
        True,
        [],
        {},
        [0, 4],
    ]
    outcomes: Counter[bool] = Counter()
    for case in range(2000):
        rng = random.Random(case)
        header = copy.deepcopy(SOUND)
        for _ in range(rng.randint(0, 2)):
            entry = header[rng.choice(["w", "v"])]
            field = rng.choice([*entry])
            if isinstance(entry[field], list) and entry[field] and rng.random() < 0.7:
                entry[field][rng.randrange(len(entry[field]))] = copy.copy(rng.choice(edges))
            else:
                entry[field] = copy.copy(rng.choice(edges))
        data = bytearray(pack(header, bytes(32)))
        if rng.random() < 0.5:
            data[rng.randrange(len(data))] = rng.randrange(256)
        put(directory, bytes(data[: rng.choice([None, None, None, rng.randrange(1, len(data))])]))
        outcomes[opens(directory)] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", ".hidden.safetensors",
     "a\nb.safetensors", "x" * 300 + ".safetensors", 7, None, ["model.safetensors"]],
)  # fmt: skip
def test_an_index_names_plain_files_only(name: Any, directory: Path) -> None:
    shard(directory, {"a": "one.safetensors", "b": name}, {"one.safetensors": ["a"]})
    with pytest.raises(ModelFileError, match=r"index\.json: .* is not a plain name of a safetensors file"):
        SafetensorsDir.open(directory)


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ("[]", "is not a JSON object"),
        ("{", "is not valid JSON"),
        ('{"a": ' * 50_000, "is not valid JSON"),
        ('{"weight_map": {"a": "one.safetensors", "a": "one.safetensors"}}', "a key occurs twice"),
        ('{"weight_map": {"a": "one.safetensors", "gone": "one.safetensors"}}', "'gone' is not in one.safetensors"),
    ],
)  # fmt: skip
def test_a_broken_index_is_refused(index: str, problem: str, directory: Path) -> None:
    shard(directory, {}, {"one.safetensors": ["a"]})
    (directory / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelFileError, match=rf"^model\.safetensors\.index\.json: .*{problem}"):
        SafetensorsDir.open(directory)


def test_a_shard_that_is_missing_or_a_link_out_is_refused(directory: Path, tmp_path: Path) -> None:
    shard(directory, {"a": "one.safetensors", "b": "two.safetensors"}, {"one.safetensors": ["a"]})
    with pytest.raises(ModelFileError, match=r"^two\.safetensors: no such file"):
        SafetensorsDir.open(directory)
    save_file({"b": np.ones((1, 1), np.float32)}, tmp_path / "elsewhere.safetensors")
    (directory / "two.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelFileError, match="leads out of the model directory"):
        SafetensorsDir.open(directory)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(name: str, kind: str, directory: Path) -> None:
    (directory / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(directory / name)
    elif kind == "directory":
        (directory / name).mkdir()
    else:
        (directory / name).symlink_to("/dev/zero")
    with pytest.raises(ModelFileError, match=r"is not a regular file|leads out of the model directory"):
        SafetensorsDir.open(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "weights.pkl"])
def test_pickled_weights_are_refused_by_name_and_never_opened(name: str, directory: Path) -> None:
    os.mkfifo(directory / name)  # opening it would wait for ever
    with pytest.raises(ModelFileError, match=rf"'{re.escape(name)}': pickled weights are never read"):
        SafetensorsDir.open(directory)


def test_pickled_weights_beside_safetensors_do_no_harm(directory: Path) -> None:
    put(directory, pack(SOUND, bytes(32)))
    put(directory, b"\x80\x04.", "pytorch_model.bin")
    assert set(SafetensorsDir.open(directory).tensors) == {"w", "v"}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ('{"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}', "has an auto_map"),
        ("[]", "is not a JSON object"),
        ("", "is not valid JSON"),
        ('{"a": 1, "a": 2}', "is not valid JSON: a key occurs twice"),
        ('{"a": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ('"' + "x" * 2**20, "is larger than 1048576 bytes"),
        ('{"a": "\udcff"}', "is not valid UTF-8"),
    ],
)  # fmt: skip
def test_a_config_that_is_broken_or_wants_code_of_its_own_is_refused(
    config: str, problem: str, directory: Path
) -> None:
    put(directory, pack(SOUND, bytes(32)))
    (directory / "config.json").write_bytes(config.encode("utf-8", "surrogateescape"))
    kind = UnsupportedModelError if "auto_map" in config else ModelFileError
    with pytest.raises(kind, match=rf"^config\.json: {problem}"):
        SafetensorsDir.open(directory)


def test_a_directory_without_config_or_weights_or_that_is_none_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"'model': has neither model\.safetensors nor"):
        SafetensorsDir.open(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ModelFileError, match=r"'model': has no config\.json"):
        SafetensorsDir.open(directory)
    with pytest.raises(ModelError, match="is not a directory"):
        SafetensorsDir.open(tmp_path / "secret")


def test_reading_a_directory_imports_no_torch_and_runs_none_of_its_code(directory: Path) -> None:
    put(directory, pack(SOUND, bytes(32)))
    (directory / "modeling_evil.py").write_text("print('evil')")
    code = (
        "import sys; from headrace.models.safetensors_dir import SafetensorsDir; d = SafetensorsDir.open(sys.argv[1]);"
        "d.load('w'); print(sorted({'torch', 'transformers', 'modeling_evil', 'grpc'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(directory)], capture_output=True, text=True, check=True, timeout=60
    )
    assert run.stdout.strip() == "[]"
