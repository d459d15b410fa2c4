"""Finds, checks and loads the native library; everything in headrace.kernels.native that calls C++ starts at `load`.

`build.py` compiles it, for a wheel or in place in a source checkout. A library that does not fit this code (another
ABI, or compiled from other sources than those beside it) is refused with what to do, never used.
$HEADRACE_NATIVE_LIBRARY names another one, a sanitizer build say, which is taken as it is but for the ABI.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from headrace.kernels.native.build import COMPILER_HINT, CSRC, LIBRARY, is_checkout, source_hash

ABI_VERSION = 2  # HR_ABI_VERSION of kernels/csrc/headrace_native.h
LIBRARY_VARIABLE = "HEADRACE_NATIVE_LIBRARY"  # another library than the built one: a sanitizer build
ISA_VARIABLE = "HEADRACE_NATIVE_ISA"  # forces one table of kernels; read by the library


class NativeLibraryError(Exception):
    """The native library cannot be used here; the message says why and what to do about it."""


@dataclass(frozen=True)
class NativeInfo:
    """What was loaded. `isa` is the table of kernels in use; `compiled` and `usable` are best first."""

    path: Path
    isa: str
    compiled: tuple[str, ...]
    usable: tuple[str, ...]


@cache
def load() -> ctypes.CDLL:
    """The library, loaded and checked once. Raises NativeLibraryError.

    Callers declare the prototypes of the functions they call; those of headrace_native.h's first block are declared.
    """
    return _checked(_path())


@cache
def info() -> NativeInfo:
    """What `load` gives. Raises NativeLibraryError."""
    library = load()
    return NativeInfo(
        _path(),
        library.hr_isa_name().decode(),
        tuple(library.hr_isa_names_compiled().decode().split(",")),
        tuple(library.hr_isa_names_usable().decode().split(",")),
    )


def last_error() -> str:
    """The sentence behind the last call of this thread that failed."""
    message: bytes = load().hr_last_error()
    return message.decode(errors="replace")


def _path() -> Path:
    forced = os.environ.get(LIBRARY_VARIABLE)
    return Path(forced) if forced else LIBRARY


def _checked(path: Path) -> ctypes.CDLL:
    forced = f"{LIBRARY_VARIABLE}={path}: " if path != LIBRARY else ""
    again = "build it again" if forced else "run `make native`"
    if not path.is_file():
        raise NativeLibraryError(_absent(forced))
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"{forced}the native library cannot be loaded: {error}") from error
    try:
        library.hr_abi_version.restype = ctypes.c_int
        for name in ("source_hash", "isa_name", "isa_names_compiled", "isa_names_usable", "last_error"):
            getattr(library, f"hr_{name}").restype = ctypes.c_char_p
        version = library.hr_abi_version()
    except AttributeError as error:
        raise NativeLibraryError(f"{forced}this is no native library of Headrace: {error}") from error
    if version != ABI_VERSION:
        raise NativeLibraryError(f"{forced}the native library's ABI is {version}, not {ABI_VERSION}: {again}")
    if not forced and is_checkout() and library.hr_source_hash().decode() != source_hash():
        raise NativeLibraryError(f"{forced}the native library is older or newer than the sources in {CSRC}: {again}")
    if not library.hr_isa_name():
        usable = library.hr_isa_names_usable().decode()
        raise NativeLibraryError(
            f"{ISA_VARIABLE}={os.environ.get(ISA_VARIABLE, '')} cannot run here; this CPU runs {usable}"
        )
    return library


def _absent(forced: str) -> str:
    if forced:
        return f"{forced}there is no such file"
    if is_checkout():
        return f"the native library is not built: run `make native` (it needs a C++ compiler: {COMPILER_HINT})"
    return (
        f"this installation has no native library, as no C++ compiler was found when it was built: install one "
        f"({COMPILER_HINT}) and install headrace again"
    )
