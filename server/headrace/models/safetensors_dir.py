"""A Hugging Face model directory: config.json and safetensors weights, one file or sharded.

Called by `headrace.models.load`. Nothing in such a directory is ever executed: pickled weights and models that bring
their own Python code are refused by name, and an index cannot lead out of the directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from headrace.models.errors import ModelFileError, UnsupportedModelError
from headrace.models.files import TensorInfo, clip, read_small
from headrace.models.gguf_blocks import F32
from headrace.models.safetensors_header import SafetensorsFile, open_file, parse_json

__all__ = ["SafetensorsDir", "TensorInfo", "contained", "has_safetensors"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_CONFIG_BYTES = 2**20
MAX_INDEX_BYTES = 16 * 2**20
MAX_SHARDS = 1000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_SHARD_NAME = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,200}\.safetensors")


class SafetensorsDir:
    """An open model directory: `config` as parsed from config.json, `tensors` by name, `load` for the weights."""

    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def __init__(self, config: dict[str, Any], files: dict[str, SafetensorsFile]) -> None:
        """`files`: for each tensor, the file that holds it."""
        self.config = config
        self._files: dict[str, SafetensorsFile] | None = files
        self.tensors = MappingProxyType({name: file.extents[name].info for name, file in files.items()})

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsDir:
        """Check config.json and every weight file. Raises ModelFileError, UnsupportedModelError (remote code)."""
        directory = Path(path)
        if not directory.is_dir():
            raise ModelFileError(f"{clip(directory.name)}: is not a directory")
        config = _read_config(directory)
        if (directory / SINGLE).exists():
            weights = open_file(contained(directory, SINGLE))
            return cls(config, dict.fromkeys(weights.extents, weights))
        if (directory / INDEX).exists():
            return cls(config, _open_shards(directory))
        raise ModelFileError(_why_no_weights(directory))

    def load(self, name: str) -> F32:
        """A tensor as float32: a read-only view of the mapping for F32, converted for F16 and BF16.

        Raises ModelFileError if there is no such tensor.
        """
        assert self._files is not None, "the directory is closed"
        if name not in self._files:
            raise ModelFileError(f"{SINGLE}: has no tensor {clip(name)}")
        return self._files[name].load(name)

    def close(self) -> None:
        """Let go of the mappings; one lives on as long as an F32 tensor loaded from it does. Idempotent."""
        self._files = None

    def __enter__(self) -> SafetensorsDir:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def has_safetensors(directory: Path) -> bool:
    """Whether a directory holds a model for `SafetensorsDir`, going by file names alone."""
    return (directory / CONFIG).exists() and ((directory / SINGLE).exists() or (directory / INDEX).exists())


def contained(directory: Path, name: str) -> Path:
    """The path of a file of the directory, links resolved. Raises ModelFileError if a link leads out of it.

    The Hugging Face cache keeps <repository>/snapshots/<revision>/<name> as a link into <repository>/blobs: that one
    way out is allowed.
    """
    home = directory.resolve()
    target = (directory / name).resolve()
    blobs = home.parent.parent / "blobs"
    if target.parent == home or (home.parent.name == "snapshots" and target.parent == blobs):
        return directory / name
    raise ModelFileError(f"{clip(name)}: is a link that leads out of the model directory")


def _read_config(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).exists():
        raise ModelFileError(f"{clip(directory.name)}: has no {CONFIG}")
    config = parse_json(read_small(contained(directory, CONFIG), MAX_CONFIG_BYTES), CONFIG)
    if config.get("auto_map"):
        raise UnsupportedModelError(f"{CONFIG}: has an auto_map, it needs code of its own; such code is never run")
    return config


def _open_shards(directory: Path) -> dict[str, SafetensorsFile]:
    index = parse_json(read_small(contained(directory, INDEX), MAX_INDEX_BYTES), INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{INDEX}: has no weight_map")
    for file_name in weight_map.values():
        if not isinstance(file_name, str) or not _SHARD_NAME.fullmatch(file_name):
            raise ModelFileError(f"{INDEX}: {clip(str(file_name))} is not a plain name of a safetensors file")
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise ModelFileError(f"{INDEX}: names {len(names)} files, more than {MAX_SHARDS}")
    shards = {name: open_file(contained(directory, name)) for name in names}
    for tensor, file_name in weight_map.items():
        if tensor not in shards[file_name].extents:
            raise ModelFileError(f"{INDEX}: tensor {clip(tensor)} is not in {file_name}")
    return {tensor: shards[file_name] for tensor, file_name in weight_map.items()}


def _why_no_weights(directory: Path) -> str:
    pickles = sorted(child.name for child in directory.iterdir() if child.suffix in PICKLE_SUFFIXES)
    if pickles:
        return f"{clip(pickles[0])}: pickled weights are never read; convert the model to safetensors"
    return f"{clip(directory.name)}: has neither {SINGLE} nor {INDEX}"
