"""What all commands share: consoles, exit statuses, sentences for failures, numbers for people, JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

OK, FAILED, USAGE, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130


def console() -> Console:
    """Standard output, with colours where it is a terminal."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def notes() -> Console:
    """Standard error: progress, hints and failures, so that standard output stays clean for pipes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def program() -> str:
    """How to type this command here: "headrace" where that finds it, else the path that it was run by."""
    own = Path(sys.argv[0])
    if own.name != "headrace" or shutil.which("headrace") is not None:
        return "headrace"
    return str(own.relative_to(Path.cwd()) if own.is_relative_to(Path.cwd()) else own)


def print_json(value: object) -> None:
    """One JSON document on standard output; dataclasses become objects."""
    json.dump(value, sys.stdout, default=_plain, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")
    sys.stdout.flush()


def explain(error: Exception) -> int | None:
    """Says on standard error what went wrong and returns the exit status; None: not a failure that we foresee."""
    from headrace.client import DeadlineExceededError, HeadraceError, UnavailableError
    from headrace.models.errors import ModelError
    from headrace.server.config import ConfigError

    if isinstance(error, ConfigError):
        _fail(*error.problems)
        return USAGE
    if isinstance(error, UnavailableError) and not error.reason:
        _fail("no server answers there", hint=f"start one with: {program()} serve")
        return UNREACHABLE
    if isinstance(error, HeadraceError):
        _fail(str(error))
        return UNREACHABLE if isinstance(error, (UnavailableError, DeadlineExceededError)) else FAILED
    if isinstance(error, (ModelError, CommandError)):
        _fail(str(error))
        return FAILED
    if isinstance(error, OSError):  # the port is taken, the cache cannot be written, a file is missing
        _fail(str(error) if error.errno is None else f"{error.strerror}: {error.filename or 'the system says no more'}")
        return FAILED
    return None


class CommandError(Exception):
    """A failure of a command that is explained by its message alone."""


def bytes_text(count: float) -> str:
    """A number of bytes in the unit that people read: 98.4 MB (powers of ten, as file sizes are)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_text(count: float) -> str:
    """A large number in short: 134.5 M."""
    for unit in ("", " k", " M", " G"):
        if count < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f} T"


def _fail(*sentences: str, hint: str = "") -> None:
    from rich.markup import escape

    err = notes()
    for sentence in sentences:
        err.print(f"[red]error:[/] {escape(sentence)}")
    if hint:
        err.print(f"[dim]{escape(hint)}[/]")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return str(value)
