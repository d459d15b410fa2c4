"""Hatch's build hook: compiles kernels/csrc into every wheel, so that an installation needs no compiler of its own.

Run by whatever builds the package: pip, also for editable installs (where the library is built in place), and
`python -m build`. Without a C++ compiler, or with HEADRACE_NO_NATIVE=1, the wheel is built without the library, loudly:
it is then pure Python, and serves with torch alone.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags

_NATIVE = Path(__file__).resolve().parent / "headrace" / "kernels" / "native"


class NativeBuildHook(BuildHookInterface[Any]):
    """Registered as the custom hook of the wheel target in pyproject.toml."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and tell hatchling what the wheel now is. `version`: "standard" or "editable"."""
        if os.environ.get("HEADRACE_NO_NATIVE", "") not in ("", "0"):
            self._warn("HEADRACE_NO_NATIVE is set")
            return
        build = _load_build()
        try:
            # A wheel must hold the library; an editable installation can be given it later, by `make native`.
            library = build.build(log=self.app.display_info)
        except build.NoCompilerError as error:
            self._warn(str(error))
            return
        except build.BuildError as error:
            raise SystemExit(f"{error}\nHEADRACE_NO_NATIVE=1 installs Headrace without its native library.") from None
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())

    def _warn(self, why: str) -> None:
        line = "=" * 100
        self.app.display_warning(
            f"{line}\nBUILDING WITHOUT THE NATIVE LIBRARY: {why}.\n"
            f"This installation of Headrace computes on the slow torch reference alone (extra: torch).\n{line}"
        )


def _load_build() -> ModuleType:
    """build.py by its path: the package that it belongs to is not importable while it is being built."""
    spec = importlib.util.spec_from_file_location("headrace_native_build", _NATIVE / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """The wheel's platform: of this machine alone, as the library is linked against this system's C library."""
    return next(tag for tag in platform_tags() if not tag.startswith(("manylinux", "musllinux")))
