"""Load a model for the native back end: its weights packed for the kernels, kept on disk, mapped at the next start.

Called by the engine process. A cold start reads weight by weight, packs it, and writes it into one file beside the
model (X.gguf.headrace-pack; in a directory: model.headrace-pack), or into the cache where that place is not writable; a
warm start maps the file and decodes nothing. A file belongs to its model by the SHA-256 of the model's files, which is
computed again only when their sizes or times have changed; and to this code by a hash of what packs. What does not
belong, or is damaged, is packed again and replaced in one piece, so any number of processes may start at once.
HEADRACE_PACK_CACHE=off, or no place that can be written: the weights are packed into memory at every start.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import headrace.kernels.native as native_package
import numpy as np
import numpy.typing as npt
from headrace.kernels.native import library
from headrace.kernels.native.executor import PackedWeights, WeightsOnTheSpot
from headrace.kernels.native.fuse import fuse
from headrace.kernels.native.matrix import GROUP, PackedMatrix, pack_matrix
from headrace.kernels.native.ops import NativeProgram, PackSpec, WeightForm, form_of, pack_specs
from headrace.kernels.native.packed import (
    MappedWeights,
    Origin,
    PackedFileError,
    PackWriter,
    SourceFile,
    change_origin,
    open_packed,
)
from headrace.kernels.program import StepProgram
from headrace.kernels.quant import QuantTensor
from headrace.models.catalogue import cache_root
from headrace.models.checkpoint import Checkpoint, open_checkpoint
from headrace.models.config import ModelConfig
from headrace.models.errors import ModelError, ModelFileError
from headrace.models.load import ModelInfo, model_info
from headrace.models.safetensors_dir import CONFIG, INDEX

log = logging.getLogger("headrace.models")

CACHE_VARIABLE = "HEADRACE_PACK_CACHE"
SUFFIX = ".headrace-pack"
_ABANDONED_SECONDS = 600.0  # a file that was being written, and has not grown for so long
_HASH_BYTES = 1 << 20

OnProgress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class PackedModel:
    """What the engine needs: the program and its packed weights. origin: for people, where these came from."""

    config: ModelConfig
    info: ModelInfo
    program: StepProgram
    weights: PackedWeights
    origin: str


def load_packed(path: str | Path, on_progress: OnProgress | None = None) -> PackedModel:
    """Load a GGUF file or a Hugging Face directory.

    on_progress is told the share of bytes done, 0..1; the last call says 1. Raises ModelFileError and
    UnsupportedModelError, the latter before a weight is read; NativeLibraryError.
    """
    path = Path(path)
    checkpoint = open_checkpoint(path)
    try:
        weights, origin = _weights(path, checkpoint, on_progress or (lambda share: None))
        return PackedModel(checkpoint.config, model_info(checkpoint, ()), checkpoint.program, weights, origin)
    finally:
        checkpoint.close()
        _give_memory_back()


def pack_path(path: Path) -> Path:
    """Where the packed weights of a model lie if its directory is writable."""
    return path / f"model{SUFFIX}" if path.is_dir() else path.with_name(path.name + SUFFIX)


def _weights(path: Path, checkpoint: Checkpoint, on_progress: OnProgress) -> tuple[PackedWeights, str]:
    setting = os.environ.get(CACHE_VARIABLE, "") or "on"
    if setting not in ("on", "off"):
        raise ModelError(f"{CACHE_VARIABLE} is {setting}; it can be on or off")
    if setting == "off":
        return _into_memory(checkpoint, on_progress), f"packed into memory, as {CACHE_VARIABLE} says"
    files = _source_files(path)
    rules = packing_rules()
    places = [pack_path(path), _cache_path(path)]
    for place in places:
        found = _open_valid(place, path, files, rules)
        if found is not None:
            on_progress(1.0)
            return found, f"mapped from {place}"
    for place in places:
        written = _into_file(place, path, files, rules, checkpoint, on_progress)
        if written is not None:
            return written, f"packed into {place}"
    log.warning("packed weights can be kept nowhere: this start and every other one packs %s into memory", path.name)
    return _into_memory(checkpoint, on_progress), "packed into memory, as no place for a file could be written"


def _open_valid(place: Path, model: Path, files: tuple[SourceFile, ...], rules: str) -> MappedWeights | None:
    """The packed weights in a file, if it is sound and belongs to this model and this code."""
    try:
        weights = open_packed(place)
    except FileNotFoundError:
        return None
    except (OSError, PackedFileError) as error:
        log.warning("%s cannot be used and is made anew: it %s", place, getattr(error, "strerror", None) or error)
        return None
    origin = weights.origin
    if origin.rules != rules:
        log.info("%s was packed by another version and is made anew", place)
        return None
    if origin.files == files:
        return weights
    # Perhaps only copied or touched: then the contents are the same.
    if [(f.name, f.num_bytes) for f in origin.files] != [(f.name, f.num_bytes) for f in files]:
        log.info("%s belongs to other weights and is made anew", place)
        return None
    if _digest(model, files) != origin.digest:
        log.info("%s belongs to other weights and is made anew", place)
        return None
    try:
        change_origin(place, replace(origin, files=files))
    except (OSError, PackedFileError):
        log.info("%s cannot be updated: every start hashes the model", place)
    return weights


def _into_file(
    place: Path, model: Path, files: tuple[SourceFile, ...], rules: str, checkpoint: Checkpoint, on_progress: OnProgress
) -> MappedWeights | None:
    """Pack all weights into a new file; None, loudly, where it cannot be written."""
    from concurrent.futures import ThreadPoolExecutor  # a warm start does without

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(place)
        packing = _Packing(checkpoint, on_progress)
        with ThreadPoolExecutor(1) as hashing, PackWriter(place, packing.names()) as writer:
            digest = hashing.submit(_digest, model, files)
            for spec, matrix in packing.matrices():
                writer.add_matrix(spec.name, matrix)
            for name, vector in packing.vectors():
                writer.add_vector(name, vector)
            if _source_files(model) != files:
                raise ModelFileError(f"{model.name}: changes while it is read")
            return writer.finish(Origin(rules, digest.result(), files), packing.forms)
    except OSError as error:
        log.warning("packed weights cannot be kept in %s: %s", place, error.strerror or error)
        return None


def _into_memory(checkpoint: Checkpoint, on_progress: OnProgress) -> PackedWeights:
    packing = _Packing(checkpoint, on_progress)
    matrices = {spec.name: matrix for spec, matrix in packing.matrices()}
    return WeightsOnTheSpot(packing.forms, matrices, {name: vector.copy() for name, vector in packing.vectors()})


class _Packing:
    """Packs the weights of an open model one after the other; no more than one matrix is in memory."""

    forms: Mapping[str, WeightForm]

    def __init__(self, checkpoint: Checkpoint, on_progress: OnProgress) -> None:
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self.forms = _forms(checkpoint)
        self._native: NativeProgram = fuse(checkpoint.program, self.forms)
        self._specs = pack_specs(self._native)
        used = [name for spec in self._specs for name in spec.sources] + [spec.name for spec in self._native.vectors]
        self._total = sum(checkpoint.tensors[name].nbytes for name in used)
        self._done = 0

    def names(self) -> list[str]:
        """Of all entries, and of all matrices whose form is kept."""
        return [spec.name for spec in self._specs] + [spec.name for spec in self._native.vectors] + list(self.forms)

    def matrices(self) -> Iterator[tuple[PackSpec, PackedMatrix]]:
        for spec in self._specs:
            weights = [self._checkpoint.load(name) for name in spec.sources]
            for name, weight in zip(spec.sources, weights, strict=True):
                assert form_of(weight) == self.forms[name], name
            yield spec, pack_matrix(weights, is_gated=spec.is_gated)
            self._report(*spec.sources)

    def vectors(self) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
        for spec in self._native.vectors:
            weight = self._checkpoint.load(spec.name)
            assert not isinstance(weight, QuantTensor), spec.name
            yield spec.name, np.ascontiguousarray(weight, np.float32)
            self._report(spec.name)

    def _report(self, *names: str) -> None:
        self._done += sum(self._checkpoint.tensors[name].nbytes for name in names)
        self._on_progress(self._done / self._total)


def _forms(checkpoint: Checkpoint) -> dict[str, WeightForm]:
    """The form of every matrix. It follows from the type in the file: only the smallest matrix of each is loaded."""
    known: dict[tuple[str, bool], WeightForm] = {}
    forms = {}
    matrices = [spec for spec in checkpoint.program.weights if len(spec.shape) == 2]
    for spec in sorted(matrices, key=lambda spec: checkpoint.tensors[spec.name].nbytes):
        key = (checkpoint.tensors[spec.name].type_name, spec.shape[1] % GROUP == 0)
        if key not in known:
            known[key] = form_of(checkpoint.load(spec.name))
        forms[spec.name] = known[key]
    return forms


def _source_files(path: Path) -> tuple[SourceFile, ...]:
    """The files that weights and program come from."""
    paths = [path]
    if path.is_dir():
        paths = sorted(path.glob("*.safetensors")) + [path / name for name in (CONFIG, INDEX) if (path / name).exists()]
    found = []
    for file in paths:
        status = file.stat()
        found.append(SourceFile(file.name, status.st_size, status.st_mtime_ns))
    return tuple(found)


def _digest(path: Path, files: tuple[SourceFile, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        one = hashlib.sha256()
        with open(path / file.name if path.is_dir() else path, "rb") as stream:
            while chunk := stream.read(_HASH_BYTES):
                one.update(chunk)
        digest.update(f"{file.name}\0{one.hexdigest()}\n".encode())
    return digest.hexdigest()


def packing_rules() -> str:
    """A hash of all code that reads, fuses and packs weights: this floor, the one below, and the native library."""
    digest = hashlib.sha256(library.load().hr_source_hash())
    native = Path(native_package.__path__[0])
    for file in sorted([*Path(__file__).parent.glob("*.py"), *native.parent.glob("*.py"), *native.glob("*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _cache_path(path: Path) -> Path:
    """In the cache, a name for this very path."""
    where = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    return cache_root() / "packed" / f"{path.name[:100]}-{where}{SUFFIX}"


def _give_memory_back() -> None:
    """What packing has freed: glibc would keep up to 32 MB of it for the life of the process."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _remove_abandoned(place: Path) -> None:
    """What processes that were killed have left of this file."""
    for part in place.parent.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            if part.name.startswith(f"{place.name}.") and time.time() - part.stat().st_mtime > _ABANDONED_SECONDS:
                part.unlink()
