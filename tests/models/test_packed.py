"""Packed weights on disk: a warm start gives what the cold one gave, and nothing that is wrong is ever used."""

import gc
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.native.executor import NativeExecutor, PackedWeights
from headrace.kernels.native.packed import open_packed
from headrace.models import packed
from headrace.models.errors import ModelError, ModelFileError
from headrace.models.gguf import GGUFFile
from headrace.models.load import load_model
from headrace.models.packed import PackedModel, load_packed, pack_path
from headrace.models.safetensors_dir import SafetensorsDir

from tests.conftest import TinyModels

MODELS = [("llama", "Q4_1"), ("llama", "Q8_0"), ("qwen2", "F32"), ("llama", ""), ("qwen3", ""), ("gemma3", "")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(packed.CACHE_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A model of one file in a directory of its own."""
    (tmp_path / "models").mkdir()
    return Path(shutil.copy(tiny_models.gguf("llama", "Q4_1"), tmp_path / "models" / "tiny.gguf"))


def forbid(monkeypatch: pytest.MonkeyPatch, *what: str) -> None:
    """From now on whoever reads a weight, or hashes the model, fails the test."""

    def fail(*_: object) -> None:
        pytest.fail("a weight was read, or the model hashed")

    if "weights" in what:
        monkeypatch.setattr(GGUFFile, "load", fail)
        monkeypatch.setattr(SafetensorsDir, "load", fail)
    if "hash" in what:
        monkeypatch.setattr(packed, "_digest", fail)


def contents(weights: PackedWeights) -> dict[str, object]:
    """Everything, comparable with ==."""
    return {
        **{name: (matrix.spec, matrix.data.tobytes()) for name, matrix in weights.matrices.items()},
        **{name: (np.shape(vector), np.asarray(vector).tobytes()) for name, vector in weights.vectors.items()},
        "forms": dict(weights.forms),
    }


def copy_model(tiny_models: TinyModels, architecture: str, quantization: str, to: Path) -> Path:
    if quantization:
        to.mkdir(exist_ok=True)
        return Path(shutil.copy(tiny_models.gguf(architecture, quantization), to / "tiny.gguf"))
    return Path(shutil.copytree(tiny_models.directory(architecture), to / "tiny"))


@pytest.mark.parametrize(("architecture", "quantization"), MODELS)
def test_a_warm_start_gives_what_the_cold_one_gave_and_reads_no_weight(
    architecture: str, quantization: str, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_model(tiny_models, architecture, quantization, tmp_path / "models")
    monkeypatch.setenv(packed.CACHE_VARIABLE, "off")
    in_memory = load_packed(path)
    assert "into memory" in in_memory.origin
    assert not pack_path(path).exists()
    monkeypatch.delenv(packed.CACHE_VARIABLE)
    cold = load_packed(path)
    assert cold.origin == f"packed into {pack_path(path)}"
    forbid(monkeypatch, "weights", "hash")
    warm = load_packed(path)
    assert warm.origin == f"mapped from {pack_path(path)}"
    assert contents(warm.weights) == contents(cold.weights) == contents(in_memory.weights)
    assert (warm.config, warm.info, warm.program) == (cold.config, cold.info, cold.program)
    for matrix in warm.weights.matrices.values():
        assert matrix.data.ctypes.data % 64 == 0
        assert not matrix.data.flags.writeable


@pytest.mark.parametrize("setting", ["", "off"])
def test_progress_rises_to_one(setting: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packed.CACHE_VARIABLE, setting)
    shares: list[float] = []
    load_packed(model, shares.append)
    assert shares == sorted(shares)
    assert 0.0 < shares[0] < 0.9
    assert shares[-1] == 1.0
    shares.clear()
    load_packed(model, shares.append)
    assert shares[-1] == 1.0


def test_a_setting_that_means_nothing_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(packed.CACHE_VARIABLE, "maybe")
    with pytest.raises(ModelError, match="HEADRACE_PACK_CACHE is maybe; it can be on or off"):
        load_packed(model)


def test_the_executor_computes_the_same_from_mapped_weights(model: Path) -> None:
    load_packed(model)
    mapped, loaded = load_packed(model), load_model(model)
    tokens = np.arange(5, dtype=np.int32) + 3
    batch = StepBatch(
        token_ids=tokens,
        positions=np.arange(5, dtype=np.int32),
        slot_mapping=np.arange(16, 21, dtype=np.int32),
        cu_seqlens_q=np.array([0, 5], np.int32),
        seq_lens=np.array([5], np.int32),
        block_tables=np.array([[1]], np.int32),
        logit_rows=np.array([0, 4], np.int32),
        sampling=(RowSampling(), RowSampling()),
    )
    options = {"num_blocks": 2, "block_size": 16, "num_threads": 1}
    executors = [NativeExecutor(mapped.program, w, **options) for w in (mapped.weights, loaded.weights)]
    del mapped  # the executor has its own copy, in huge pages: nothing is held twice
    gc.collect()
    assert str(pack_path(model)) not in Path("/proc/self/maps").read_text()
    logits = [executor.forward(batch) for executor in executors]
    assert np.isfinite(logits[0]).all()
    assert (logits[0] == logits[1]).all()


def change_a_weight(model: Path) -> None:
    """And nothing that a reader of sizes would see."""
    data = bytearray(model.read_bytes())
    data[-40] ^= 0x11
    model.write_bytes(data)


def test_other_weights_of_the_same_size_are_packed_again(model: Path) -> None:
    before = contents(load_packed(model).weights)
    change_a_weight(model)
    os.utime(model, ns=(1, 1))
    after = load_packed(model)
    assert after.origin.startswith("packed into")
    assert contents(after.weights) != before
    assert load_packed(model).origin.startswith("mapped from")


def test_a_touched_model_is_hashed_once_and_not_packed_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(load_packed(model).weights)
    os.utime(model, ns=(7, 7))
    forbid(monkeypatch, "weights")
    assert contents(load_packed(model).weights) == before
    forbid(monkeypatch, "hash")
    assert contents(load_packed(model).weights) == before


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_files_of_a_directory_count_each(architecture: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    path = copy_model(tiny_models, architecture, "", tmp_path / "models")
    load_packed(path)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (path / "model.safetensors").write_bytes(data)
    assert load_packed(path).origin.startswith("packed into")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config + " ")
    assert load_packed(path).origin.startswith("packed into")
    assert load_packed(path).origin.startswith("mapped from")


def test_other_code_packs_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_packed(model)
    monkeypatch.setattr(packed, "packing_rules", lambda: "other")
    assert load_packed(model).origin.startswith("packed into")
    assert load_packed(model).origin.startswith("mapped from")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = [
    (truncate, "bytes instead of"),
    (flip_header, "wrong checksum"),
    (lambda path: path.write_bytes(b""), "too short"),
    (lambda path: path.write_bytes(b"GGUF" + bytes(10_000)), "does not hold packed weights"),
    (make_fifo, "not a regular file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_file_is_replaced_loudly(
    damage: object, message: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    want = contents(load_packed(model).weights)
    damage(pack_path(model))  # type: ignore[operator]
    again = load_packed(model)
    assert again.origin == f"packed into {pack_path(model)}"
    assert contents(again.weights) == want
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert message in record.getMessage()
    caplog.clear()
    assert load_packed(model).origin.startswith("mapped from")
    assert not caplog.records


def test_a_place_that_is_taken_by_a_directory_is_left_alone(model: Path, cache: Path) -> None:
    pack_path(model).mkdir()
    first = load_packed(model)
    assert first.origin.startswith(f"packed into {cache / 'packed'}")
    assert load_packed(model).origin.startswith(f"mapped from {cache / 'packed'}")
    assert sorted(os.listdir(model.parent)) == ["tiny.gguf", pack_path(model).name]


def test_a_model_that_changes_while_it_is_read_leaves_nothing(model: Path) -> None:
    def touch(share: float) -> None:
        os.utime(model, ns=(time.time_ns(), time.time_ns()))

    with pytest.raises(ModelFileError, match=r"tiny\.gguf: changes while it is read"):
        load_packed(model, touch)
    assert os.listdir(model.parent) == ["tiny.gguf"]


def test_what_killed_processes_left_is_removed_in_time(model: Path) -> None:
    old, young = (pack_path(model).with_name(f"{pack_path(model).name}.{pid}.part") for pid in ("a1", "b2"))
    for part in (old, young):
        part.write_bytes(bytes(100))
    os.utime(old, (0, 0))
    load_packed(model)
    assert sorted(os.listdir(model.parent)) == sorted(["tiny.gguf", pack_path(model).name, young.name])


# Run with the model as its argument: takes root's right to write anywhere, loads, and prints where from.
LOAD = """
import ctypes, logging, resource, sys
logging.basicConfig(level=logging.WARNING, format="%(message)s")
ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
if "--small-files" in sys.argv:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from headrace.models.packed import load_packed
weights = load_packed(sys.argv[1])
print(weights.origin)
print(len(weights.weights.matrices))
print([name for name in ("torch", "safetensors", "tokenizers", "jinja2", "filelock", "grpc") if name in sys.modules])
"""


def start(model: Path, *options: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LOAD, str(model), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once(model: Path) -> None:
    processes = [start(model) for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    for out, err in outputs:
        assert pack_path(model).name in out, err
    assert sorted(os.listdir(model.parent)) == ["tiny.gguf", pack_path(model).name]
    assert load_packed(model).origin.startswith("mapped from")


def test_a_directory_that_cannot_be_written_means_the_cache_loudly(model: Path, cache: Path) -> None:
    model.parent.chmod(0o555)
    try:
        out, err = start(model).communicate(timeout=60)
        assert f"packed into {cache / 'packed'}" in out, err
        assert f"packed weights cannot be kept in {pack_path(model)}: Permission denied" in err
        out, err = start(model).communicate(timeout=60)
        assert f"mapped from {cache / 'packed'}" in out
        assert err == ""
    finally:
        model.parent.chmod(0o755)


def test_no_space_anywhere_means_memory_loudly(model: Path, cache: Path) -> None:
    out, err = start(model, "--small-files").communicate(timeout=60)
    assert out.startswith("packed into memory")
    assert err.count("File too large") == 2
    assert "packed weights can be kept nowhere" in err
    assert os.listdir(model.parent) == ["tiny.gguf"]
    assert os.listdir(cache / "packed") == []


def test_the_engine_needs_no_tokenizer_no_template_no_torch(model: Path) -> None:
    for _ in range(2):
        out, err = start(model).communicate(timeout=60)
        assert out.splitlines()[-1] == "[]", err


def test_the_default_model(smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / smollm2_path.name
    path.symlink_to(smollm2_path)  # packed beside the link: the cache is left alone
    cold = load_packed(path)
    forbid(monkeypatch, "weights", "hash")
    warm: PackedModel = load_packed(path)
    assert contents(warm.weights) == contents(cold.weights)
    size = sum(matrix.data.nbytes for matrix in warm.weights.matrices.values())
    assert pack_path(path).stat().st_size < size + 500_000
    assert open_packed(pack_path(path)).origin.files[0].num_bytes == 98_362_432
