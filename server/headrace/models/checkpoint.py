"""One view of a model on disk, be it a GGUF file or a Hugging Face directory: its config, its program, its weights.

Called by `load.py`. Here live the differences between the two kinds: names, the permuted rows of q and k in GGUF's
llama files, Gemma's norms stored as w instead of 1 + w in Hugging Face's. Opening reads headers alone and has checked
that exactly the weights of the program are there, with its shapes.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from headrace.kernels.program import StepProgram
from headrace.kernels.quant import QuantTensor, Weight
from headrace.models.config import ModelConfig
from headrace.models.decoder import build_program
from headrace.models.errors import ModelFileError, UnsupportedModelError
from headrace.models.files import TensorInfo, clip, read_small
from headrace.models.gguf import GGUFFile
from headrace.models.rope import RopeConfig
from headrace.models.safetensors_dir import SafetensorsDir, contained
from headrace.models.safetensors_header import parse_json
from headrace.models.weight_names import hf_names

if TYPE_CHECKING:
    from headrace.models.tokenizer import Tokenizer

_ROPE_DIVISORS = "rope_freqs.weight"
_MAX_TEMPLATE_FILE_BYTES = 1 << 20
_MAX_TOKENIZER_CONFIG_BYTES = 16 << 20


class Checkpoint(ABC):
    """An open model. `tensors` is by the program's names; `file_bytes` counts all its files."""

    config: ModelConfig
    program: StepProgram
    tensors: Mapping[str, TensorInfo]
    file_bytes: int

    @abstractmethod
    def load(self, name: str) -> Weight:
        """A weight by the program's name, as the program wants it. Raises ModelFileError."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Raises TokenizerError and UnsupportedModelError."""

    @abstractmethod
    def chat_template(self) -> str:
        """The template's source, or "" where the model has none. Raises ModelFileError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; weights already loaded keep what they need."""


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file or a directory and check it against its program. Raises ModelError."""
    return _HfCheckpoint(path) if path.is_dir() else _GgufCheckpoint(path)


class _GgufCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        self._file = GGUFFile.open(path)
        tensors = dict(self._file.tensors)
        self.config = ModelConfig.from_gguf(self._file.metadata, tensors, path.name)
        if tensors.pop(_ROPE_DIVISORS, None) is not None:
            self.config = _with_rope_divisors(self.config, self._file.load(_ROPE_DIVISORS), path.name)
        self.program = build_program(self.config)
        _check_tensors(self.program, {name: name for name in tensors}, tensors, path.name)
        self.tensors = tensors
        self.file_bytes = path.stat().st_size

    def load(self, name: str) -> Weight:
        weight = self._file.load(name)
        if self.config.architecture != "llama":
            return weight
        if name.endswith("attn_q.weight"):
            return unpermute_rows(weight, self.config.num_heads)
        if name.endswith("attn_k.weight"):
            return unpermute_rows(weight, self.config.num_kv_heads)
        return weight

    def tokenizer(self) -> Tokenizer:
        from headrace.models.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self._file.metadata)

    def chat_template(self) -> str:
        template = self._file.metadata.get("tokenizer.chat_template", "")
        return template if isinstance(template, str) else ""

    def close(self) -> None:
        self._file.close()


class _HfCheckpoint(Checkpoint):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._dir = SafetensorsDir.open(path)
        self.config = ModelConfig.from_hf(self._dir.config)
        self.program = build_program(self.config)
        names = hf_names(self.config)
        ignored = {name for name in self._dir.tensors if name.endswith(".rotary_emb.inv_freq")}  # old files store it
        if self.config.is_tied:
            ignored.add("lm_head.weight")  # some writers store the tied table twice
        tensors = {name: info for name, info in self._dir.tensors.items() if name not in ignored}
        _check_tensors(self.program, names, tensors, path.name)
        self._names = names
        self.tensors = {name: tensors[file_name] for name, file_name in names.items()}
        self.file_bytes = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def load(self, name: str) -> Weight:
        weight = self._dir.load(self._names[name])
        if self.config.architecture == "gemma3" and name.endswith("norm.weight"):
            folded: npt.NDArray[np.float32] = _float32(weight) + np.float32(1.0)
            return folded
        return weight

    def tokenizer(self) -> Tokenizer:
        from headrace.models.tokenizer import Tokenizer

        return Tokenizer.from_directory(self._path)

    def chat_template(self) -> str:
        if (self._path / "chat_template.jinja").exists():
            source = read_small(contained(self._path, "chat_template.jinja"), _MAX_TEMPLATE_FILE_BYTES)
            try:
                return source.decode("utf-8")
            except UnicodeDecodeError:
                raise ModelFileError("chat_template.jinja: is not valid UTF-8") from None
        if not (self._path / "tokenizer_config.json").exists():
            return ""
        config = read_small(contained(self._path, "tokenizer_config.json"), _MAX_TOKENIZER_CONFIG_BYTES)
        template = parse_json(config, "tokenizer_config.json").get("chat_template") or ""
        if isinstance(template, list):  # several, by name
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default", "")
        if not isinstance(template, str):
            raise ModelFileError("tokenizer_config.json: chat_template must be a string or a list of named ones")
        return template

    def close(self) -> None:
        self._dir.close()


def unpermute_rows(weight: Weight, num_heads: int) -> Weight:
    """Undo the row order of llama.cpp's converter (`LlamaModel.permute`): from rotary pairs side by side (2i, 2i + 1)
    to pairs in halves (i, i + head_dim / 2). Works on quantised rows as they are: a group lies inside one row."""
    rows = weight.shape[0]
    order = np.arange(rows).reshape(num_heads, rows // num_heads // 2, 2).swapaxes(1, 2).reshape(rows)
    if isinstance(weight, QuantTensor):
        zeros = None if weight.zeros is None else weight.zeros[order]
        return dataclasses.replace(weight, packed=weight.packed[order], scales=weight.scales[order], zeros=zeros)
    dense: npt.NDArray[np.float32] = _float32(weight)[order]
    return dense


def _with_rope_divisors(config: ModelConfig, divisors: Weight, file_name: str) -> ModelConfig:
    if config.architecture != "llama":
        raise UnsupportedModelError(f"{file_name}: {_ROPE_DIVISORS} with architecture {config.architecture}")
    if isinstance(divisors, QuantTensor) or divisors.shape != (config.head_dim // 2,):
        raise ModelFileError(f"{file_name}: {_ROPE_DIVISORS} must hold {config.head_dim // 2} numbers")
    values = tuple(_float32(divisors).tolist())
    if not all(0.0 < value < math.inf for value in values):
        raise ModelFileError(f"{file_name}: {_ROPE_DIVISORS} must be positive and finite")
    with_divisors: dict[RopeConfig, RopeConfig] = {}  # layers that were alike stay the same object
    layers = tuple(
        dataclasses.replace(
            layer, rope=with_divisors.setdefault(layer.rope, dataclasses.replace(layer.rope, divisors=values))
        )
        for layer in config.layers
    )
    return dataclasses.replace(config, layers=layers)


def _float32(weight: Weight) -> npt.NDArray[np.float32]:
    assert not isinstance(weight, QuantTensor)
    return weight.astype(np.float32, copy=False)


def _check_tensors(
    program: StepProgram, names: Mapping[str, str], tensors: Mapping[str, TensorInfo], file_name: str
) -> None:
    """Exactly the program's weights, of its shapes. `names`: from the program's names to the file's."""
    wanted = {names.get(spec.name, spec.name): spec.shape for spec in program.weights}
    for name, shape in wanted.items():
        info = tensors.get(name)
        if info is None:
            raise ModelFileError(f"{file_name}: tensor {name} is missing")
        if info.shape != shape:
            raise ModelFileError(f"{file_name}: tensor {name} has the shape {info.shape}, its model wants {shape}")
    extra = next((name for name in tensors if name not in wanted), None)
    if extra is not None:
        raise UnsupportedModelError(f"{file_name}: tensor {clip(extra)} belongs to nothing in this architecture")
