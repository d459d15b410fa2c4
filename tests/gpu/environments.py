"""The two Tritons that judge kernels without a GPU, each in a folder of its own over the ordinary virtual environment.

Called by gates.py. Triton is no part of the dev group: it is 190 to 290 MB to fetch, and only these gates need it. The
versions are pinned, because machine code and interpreter differ from one to the next:

- triton 3.6.0 with numpy < 2.4 (its interpreter fails on newer ones): interpreter and compiler;
- triton 3.8.0 with ttsem 0.1.0, which reads the IR of that version alone. ttsem asks for Python 3.12; 3.11 works.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

BUILD = Path("build")
CACHE = BUILD / "gpu-gates"


@dataclass(frozen=True)
class Environment:
    """A folder with packages that go before the virtual environment's. least_python: below it nothing is installed."""

    folder: Path
    requirements: tuple[tuple[str, ...], ...]
    least_python: tuple[int, int] = (3, 10)

    @property
    def why_not(self) -> str:
        """Why this interpreter cannot use it, or ""."""
        if sys.version_info >= self.least_python:
            return ""
        return (
            f"{self.folder.name} needs Python {'.'.join(map(str, self.least_python))}, this is {sys.version.split()[0]}"
        )

    def set_up(self) -> None:
        """Install once; a change of the requirements installs again. Raises CalledProcessError."""
        stamp = self.folder / ".installed"
        wanted = repr(self.requirements)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        for arguments in self.requirements:
            print(f"installing {' '.join(arguments)} into {self.folder}", flush=True)
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
            subprocess.run([*pip, str(self.folder), *arguments], check=True)
        stamp.write_text(wanted)

    def variables(self, *, interprets: bool = False) -> dict[str, str]:
        """The environment of a process that uses it."""
        path = os.pathsep.join(part for part in (str(self.folder.resolve()), os.environ.get("PYTHONPATH", "")) if part)
        names = {
            **os.environ,
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "TRITON_CACHE_DIR": str((CACHE / "triton").resolve()),
        }
        names.pop("TRITON_INTERPRET", None)
        return {**names, "TRITON_INTERPRET": "1"} if interprets else names


TRITON = Environment(BUILD / "triton-3.6", (("triton==3.6.0", "numpy<2.4"),))
TTSEM = Environment(
    BUILD / "triton-3.8", (("triton==3.8.0",), ("--ignore-requires-python", "ttsem==0.1.0")), least_python=(3, 11)
)
