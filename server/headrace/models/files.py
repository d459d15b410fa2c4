"""Opening and mapping a model file safely: what the GGUF and safetensors readers share.

Called by `gguf.py` and `safetensors_dir.py`.
"""

from __future__ import annotations

import mmap
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from headrace.models.errors import ModelFileError


@dataclass(frozen=True)
class TensorInfo:
    """What a file says of one tensor: `shape` in numpy order, (out, in) for a matrix; `nbytes` is its size on disk."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int


def clip(text: str, limit: int = 64) -> str:
    """`text` quoted for a message, escaped and cut: a hostile name must neither flood nor forge a log line."""
    return ascii(text if len(text) <= limit else text[:limit] + "...")


def open_regular(path: Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    A FIFO, device, socket or directory is refused, and never waited for (O_NONBLOCK). Raises ModelFileError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ModelFileError(f"{path.name}: no such file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a usable file name"
        raise ModelFileError(f"{clip(path.name)}: cannot be opened: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelFileError(f"{path.name}: is not a regular file")
    return fd


def map_file(path: Path) -> mmap.mmap:
    """Map a whole regular file read-only. Raises ModelFileError.

    The mapping follows the file: the operator must not truncate a model in place while it is served (replace it by
    rename, as `sources` does).
    """
    fd = open_regular(path)
    try:
        if os.fstat(fd).st_size == 0:
            raise ModelFileError(f"{path.name}: is empty")
        return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "mapping failed"
        raise ModelFileError(f"{path.name}: cannot be mapped: {reason}") from None
    finally:
        os.close(fd)


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file that must not be larger than `limit`. Raises ModelFileError."""
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as stream:
        size = os.fstat(fd).st_size
        if size > limit:
            raise ModelFileError(f"{path.name}: is larger than {limit} bytes")
        return stream.read(size)
