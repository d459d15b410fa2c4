"""What a model is, as a hash: two servers with the same digests continue each other's generations.

Called by the front end (`headrace.server.model_host`) while the engine loads, and by `headrace replay`. Hashing runs at
the speed of the disk or of SHA-256, 1 to 2 GB/s, without the GIL.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

from headrace.models.files import open_regular

_READ_BYTES = 1 << 20
# A directory's files that decide what the model computes; its tokenizer has a digest of its own.
_DIRECTORY_FILES = ("*.safetensors", "config.json", "*.index.json")


def model_digest(path: Path) -> str:
    """SHA-256 of a GGUF file, as `sha256sum` prints it; of a directory, of the lines "<name> NUL <SHA-256> LF" of its
    configuration and weights, by name. Raises ModelFileError."""
    if not path.is_dir():
        return _file_digest(path)
    digest = hashlib.sha256()
    for file in sorted({file for pattern in _DIRECTORY_FILES for file in path.glob(pattern)}):
        digest.update(f"{file.name}\0{_file_digest(file)}\n".encode())
    return digest.hexdigest()


def token_hash(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, each as 4 bytes, little-endian."""
    return hashlib.sha256(token_bytes(ids)).hexdigest()


def token_bytes(ids: Sequence[int]) -> bytes:
    """Token ids, each as 4 bytes, little-endian."""
    packed = array("I", ids)
    assert packed.itemsize == 4
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(open_regular(path), "rb", buffering=0) as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
