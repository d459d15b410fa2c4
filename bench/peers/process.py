"""Peers as processes of their own: pinned to the same cores, stopped while another is measured, killed at the end.

Called by `offline.py` and `servers.py`. A process that is not being measured is held by SIGSTOP, so that no spinning
thread pool or polling loop of one can cost another anything.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from bench.peers.install import cache_root

_STOP_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class PeerError(Exception):
    """A peer did not do what it was asked; the message says what it said."""


class PinnedProcess:
    """A process group on the given cores. `begin` is when it was started, seconds of time.perf_counter()."""

    def __init__(
        self, name: str, command: Sequence[object], cpus: Sequence[int], env: Mapping[str, str], *, piped: bool
    ) -> None:
        self.name = name
        logs = cache_root() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._log = logs / f"{re.sub(r'[^A-Za-z0-9]+', '-', name)}.log"
        pipe = subprocess.PIPE if piped else subprocess.DEVNULL
        self.begin = time.perf_counter()
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdin=pipe,
                stdout=pipe if piped else log,
                stderr=log,
                env={**os.environ, **env},
                start_new_session=True,
                preexec_fn=pinned(cpus),
            )

    def hold(self) -> None:
        """Stop the whole group until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it, gently first."""
        self.resume()
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def last_words(self) -> str:
        """The last line of its log that tells of an error, or the last one, without paths."""
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.search(r"error|failed|fatal", line, re.IGNORECASE)]
        return without_paths((errors or lines or ["it said nothing"])[-1].strip()[-200:])

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


class Driver(PinnedProcess):
    """A process that speaks drivers/protocol.py. Raises PeerError when it does not come up."""

    def __init__(
        self, name: str, command: Sequence[object], cpus: Sequence[int], env: Mapping[str, str], wait: float = 120.0
    ) -> None:
        super().__init__(
            name, command, cpus, {**env, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}, piped=True
        )
        self._buffer = b""
        try:
            self.facts = self._answer(wait)
        except PeerError:
            self.close()
            raise
        self.hold()

    def call(self, op: str, wait: float = 600.0, **arguments: Any) -> dict[str, Any]:
        """The answer to one command. Raises PeerError."""
        assert self.process.stdin is not None
        self.resume()
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
            return self._answer(wait)
        except OSError as error:
            raise PeerError(f"{self.name} is gone: {self.last_words()}") from error
        finally:
            self.hold()

    def _answer(self, wait: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        fd = self.process.stdout.fileno()
        deadline = time.monotonic() + wait
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise PeerError(f"{self.name} did not answer within {wait:g} s")
            data = os.read(fd, 1 << 16)
            if not data:
                raise PeerError(f"{self.name} ended: {self.last_words()}")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {without_paths(answer['error'])}")
        return answer


def pinned(cpus: Sequence[int]) -> Callable[[], None]:
    """What a child does before its program: take its cores, and ask to be killed with us (a held one would stay)."""
    libc, kill = ctypes.CDLL(None), int(signal.SIGKILL)  # looked up here: little is safe after a fork

    def prepare() -> None:
        os.sched_setaffinity(0, cpus)
        libc.prctl(_PR_SET_PDEATHSIG, kill, 0, 0, 0)

    return prepare


def without_paths(text: str) -> str:
    """The text with every path cut to its last part: results are public, this machine's directories are not."""
    return re.sub(r"(?<![\w.])/(?:[^\s/'\":,]+/)+", "", text)
