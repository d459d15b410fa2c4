"""Fetches `hf://owner/name` through huggingface_hub, into the cache that all Hugging Face programs share.

Called by `sources.py`. Only what is read is fetched: JSON, tokenizer files, safetensors, or one GGUF file; never
pickled weights, never Python code. HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE mean what they always mean.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from headrace.models.errors import SourceError
from headrace.models.progress import OnProgress, Progress
from headrace.models.safetensors_dir import PICKLE_SUFFIXES, has_safetensors
from headrace.models.wheel_source import tree_bytes

_POLL_SECONDS = 0.2
_SPEC = re.compile(
    r"hf://(?P<owner>[\w\-.]+)/(?P<name>[\w\-.]+)(?:/(?P<file>[\w\-./]+\.gguf))?(?:@(?P<revision>[\w\-./]+))?", re.ASCII
)
_SMALL_FILES = (".json", ".model", ".txt", ".jinja")  # configuration, tokenizer, chat template


@dataclass(frozen=True)
class HubSpec:
    """A parsed `hf://owner/name[/file.gguf][@revision]`."""

    repository: str
    file: str | None
    revision: str


def parse(spec: str) -> HubSpec:
    """Raises SourceError if it is not of the form."""
    match = _SPEC.fullmatch(spec)
    if match is None or ".." in spec:
        raise SourceError(f"{spec[:200]!a} is not of the form hf://owner/name[/file.gguf][@revision]")
    return HubSpec(f"{match['owner']}/{match['name']}", match["file"], match["revision"] or "main")


def cache_directory() -> Path:
    """The Hugging Face cache."""
    from huggingface_hub import constants

    return Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE).expanduser()


def fetch(spec: str, on_progress: OnProgress) -> Path:
    """The snapshot directory of a repository, or its GGUF file; what is cached already is not fetched again.

    Without a network, what the cache holds of that revision is used. Raises SourceError.
    """
    wanted = parse(spec)
    import huggingface_hub as hub  # half a second: only who asks for the hub pays for it
    from huggingface_hub import errors

    try:
        return _download(spec, wanted, on_progress)
    except SourceError:
        raise
    except errors.GatedRepoError as error:
        raise SourceError(f"{spec}: is gated; accept its licence on the hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(f"{spec}: no such repository, or it is private and HF_TOKEN does not open it") from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(f"{spec}: has no revision {wanted.revision}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise SourceError(f"{spec}: is not in the cache, and the hub cannot be reached") from error
    except Exception as error:  # its HTTP library, and so the rest of its exceptions, changes between versions
        raise SourceError(
            f"{spec}: the download failed ({type(error).__name__}, huggingface_hub {hub.__version__})"
        ) from error


def choose(spec: str, names: Sequence[str], file: str | None) -> list[str]:
    """Which files of a repository to fetch: the one GGUF file that is meant, or what a safetensors model needs.

    Raises SourceError, naming what is there instead.
    """
    if file is not None:
        if file not in names:
            raise SourceError(f"{spec}: the repository has no {file}")
        return [file]
    top = [name for name in names if "/" not in name]
    if any(name.endswith(".safetensors") for name in top):
        return [name for name in top if name.endswith((".safetensors", *_SMALL_FILES))]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise SourceError(f"{spec}: holds several GGUF files, name one of them: {', '.join(sorted(ggufs)[:40])}")
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise SourceError(f"{spec}: holds only pickled weights ({pickles[0]}), which are never read")
    raise SourceError(f"{spec}: holds neither safetensors nor GGUF files")


def _download(spec: str, wanted: HubSpec, on_progress: OnProgress) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # the caller draws its own
    endpoint, cache = os.environ.get("HF_ENDPOINT") or None, cache_directory()
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(
            wanted.repository, revision=wanted.revision, files_metadata=True, timeout=30
        )
    except (errors.HfHubHTTPError, errors.HFValidationError):
        raise
    except Exception:  # no network: what the cache holds will do
        # The library would call a snapshot incomplete for lack of the files that `choose` left out, so it is asked for
        # none; the loaders name what is missing.
        path = hub.snapshot_download(
            wanted.repository, revision=wanted.revision, cache_dir=cache, local_files_only=True, allow_patterns=[]
        )
        return _in_snapshot(spec, Path(path), wanted.file)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    names = choose(spec, list(sizes), wanted.file)
    if any(not re.fullmatch(r"[\w\-./]+", name, re.ASCII) for name in names):
        raise SourceError(f"{spec}: a file name holds a character that is not allowed")
    blobs = cache / f"models--{wanted.repository.replace('/', '--')}" / "blobs"
    with _watched(blobs, sum(sizes[name] for name in names), on_progress):
        path = hub.snapshot_download(
            wanted.repository,
            revision=wanted.revision,
            cache_dir=cache,
            endpoint=endpoint,
            allow_patterns=names,
        )
    return Path(path, names[0]) if names[0].endswith(".gguf") else Path(path)


def _in_snapshot(spec: str, snapshot: Path, file: str | None) -> Path:
    """What an earlier fetch left of this repository: the snapshot of a safetensors model, or a GGUF file in it."""
    if file is None and has_safetensors(snapshot):
        return snapshot
    names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
    return snapshot / choose(spec, names, file)[0]


@contextmanager
def _watched(directory: Path, total: int, on_progress: OnProgress) -> Iterator[None]:
    """Report from a thread how large a directory has grown; the caller's thread is inside the library meanwhile."""
    done = threading.Event()
    start = tree_bytes(directory)

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            on_progress(Progress("download", min(tree_bytes(directory) - start, total), total))

    thread = threading.Thread(target=watch, name="headrace-download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    on_progress(Progress("download", total, total))


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache: the directory of a snapshot, or a GGUF file of one."""

    spec: str
    path: Path
    nbytes: int


def cached() -> list[CachedModel]:
    """What the Hugging Face cache holds of safetensors models and GGUF files, by name."""
    directory = cache_directory()
    if not directory.is_dir():
        return []
    import huggingface_hub as hub

    found = []
    for repository in hub.scan_cache_dir(directory).repos:
        if repository.repo_type != "model":
            continue
        for revision in repository.revisions:
            at = min(revision.refs, default=revision.commit_hash)
            suffix = "" if "main" in revision.refs else f"@{at}"
            base = f"hf://{repository.repo_id}"
            if has_safetensors(revision.snapshot_path):
                found.append(CachedModel(base + suffix, revision.snapshot_path, revision.size_on_disk))
            found += [
                CachedModel(
                    f"{base}/{file.file_path.relative_to(revision.snapshot_path)}{suffix}", file.file_path, size
                )
                for file in revision.files
                if file.file_name.endswith(".gguf") and (size := file.size_on_disk)
            ]
    return sorted(found, key=lambda model: model.spec)
