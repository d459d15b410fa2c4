"""Starts an engine process. Called by `supervisor`, and by the CLI before it imports gRPC and the rest of the front
end: the two processes then import side by side. Imports next to nothing itself.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

ENGINE_COMMAND = (sys.executable, "-m", "headrace.server.engine_main")
_SOCKET_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True)
class SpawnedEngine:
    """An engine process that waits for its Load frame, and our end of its socket. It exits when that is closed."""

    process: subprocess.Popen[bytes]
    socket: socket.socket

    def close(self) -> None:
        """End it, where the supervisor has not done so already."""
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def spawn_engine(command: Sequence[str] = ENGINE_COMMAND) -> SpawnedEngine:
    """Spawned, never forked: gRPC's threads do not survive a fork."""
    near, far = socket.socketpair()
    for end in (near, far):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    try:
        with far:
            # Popen, not an event loop's own: it uses vfork, so that no fork handler of gRPC's threads ever runs.
            process = subprocess.Popen(
                [*command, "--fd", str(far.fileno()), "--parent", str(os.getpid())],
                pass_fds=(far.fileno(),),
                stdin=subprocess.DEVNULL,
            )
    except BaseException:
        near.close()
        raise
    return SpawnedEngine(process, near)
