"""How the tests run the `headrace` command: in this process, in one of its own, or on a terminal."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from headrace.server import cli

PATIENCE = 30.0  # seconds for what should take a moment; only a failure waits that long
COMMAND = (sys.executable, "-m", "headrace.server.cli")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str


Invoke = Callable[..., Outcome]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Invoke]:
    """Runs the command in this process, with `stdin` as its piped input. Commands that set up the log leave a handler
    on a standard error that ends with the test; what was there before comes back."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def run(*arguments: str, stdin: str = "") -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["headrace", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setenv("COLUMNS", "200")
        status = cli.main()
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    yield run
    root.handlers[:] = handlers
    root.setLevel(level)


@contextmanager
def spawned(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own, told to stop at the end and killed where it does not."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise


# Makes the slave end of the pty (standard input) the controlling terminal, so that Ctrl-C becomes SIGINT.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


class Terminal:
    """A person at a terminal of 120 columns: types, and waits for words to appear."""

    def __init__(self, arguments: Sequence[str], environment: dict[str, str]) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self._seen = ""
        settings = {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TAKE_TERMINAL, *COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**os.environ, **settings},
            start_new_session=True,
        )
        os.close(slave)

    def type(self, keys: str) -> None:
        """Press keys; \\r is Enter, \\x03 Ctrl-C, \\x04 Ctrl-D."""
        os.write(self._master, keys.encode())

    def expect(self, words: str) -> str:
        """Wait until words appear; returns what was shown up to them and forgets it."""
        end = time.monotonic() + PATIENCE
        while words not in self._seen:
            if not self._read(end - time.monotonic()):
                raise AssertionError(f"{words!r} did not appear; shown was {self._seen!r}")
        before, _, self._seen = self._seen.partition(words)
        return before

    def wait(self) -> int:
        """Read on until the command leaves; its status."""
        end = time.monotonic() + PATIENCE
        while self._read(end - time.monotonic()):
            pass
        return self._process.wait(PATIENCE)

    def close(self) -> None:
        """End the command if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._master)

    def _read(self, seconds: float) -> bool:
        ready, _, _ = select.select([self._master], [], [], max(0.0, seconds))
        if not ready:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self._seen += _ESCAPES.sub("", data.decode(errors="replace"))
        return bool(data)
