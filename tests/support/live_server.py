"""A whole server in a process of its own, for tests that stand where a user stands: the client library and the CLI.

Behind the tiny Llama's tokenizer runs the counting engine of tests/server/scripted_engine.py: the token after t is
t + 1, one step takes `step_seconds`, so that a stream can be cancelled half-way, and the process starts without torch.
Run as a script, this file is that process; it ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
LONG = 400  # tokens of a stream that no test waits for
PATIENCE = 20.0  # seconds for what should take milliseconds; only a failure waits that long


class LiveServer:
    """The process as its parent sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.target = str(self._ask("")["target"])

    def stats(self) -> dict[str, int]:
        """The server's count of live calls, sequences and tokens, and the engine's of free and all blocks."""
        return self._ask("stats\n")

    def wait_idle(self) -> None:
        """Until everything has been given back; fails after PATIENCE."""
        until(lambda: self._is_idle(self.stats()), self.stats)

    def steps(self) -> int:
        """Engine steps so far."""
        return self.stats()["steps"]

    def wait_freed(self, since: int) -> None:
        """Until everything has been given back, and long before LONG tokens were generated after step `since`."""
        self.wait_idle()
        assert self.steps() - since < LONG / 2, "it ran to its end"

    def kill(self) -> None:
        """End the process as a crash would."""
        self._process.kill()
        self._process.wait()

    @staticmethod
    def _is_idle(stats: dict[str, int]) -> bool:
        return stats["sequences"] == stats["tokens"] == 0 and stats["free_blocks"] == stats["all_blocks"]

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line)
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextmanager
def live_server(model: Path, *, step_seconds: float = 0.01, **settings: Any) -> Iterator[LiveServer]:
    """Start a server and stop it. `settings` are those of ServerConfig; the model is called "tiny"."""
    options = json.dumps({"model": str(model), "model_name": "tiny", "port": 0, "lame_duck": 0.0, **settings})
    command = [sys.executable, __file__, str(step_seconds), options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield LiveServer(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def until(condition: Callable[[], bool], describe: Callable[[], object] = lambda: "") -> None:
    """Wait until a condition holds; fails after PATIENCE."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, describe()
        time.sleep(0.01)


async def _serve(step_seconds: float, settings: dict[str, Any]) -> None:
    from headrace.server.app import start_server
    from headrace.server.config import ServerConfig

    from tests.server import scripted_engine

    engine = scripted_engine.command(step_seconds=step_seconds)
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with start_server(ServerConfig(**settings), engine_command=engine) as running:
        await running.wait_ready()
        print(json.dumps({"target": running.address}), flush=True)
        while await lines.readline():
            live, blocks = running.admission.stats(), await running.host.client().ping()
            answer = {
                "calls": live.num_live,
                "sequences": live.num_sequences,
                "tokens": live.num_tokens,
                "steps": blocks.num_steps,
                "free_blocks": blocks.num_free_blocks,
                "all_blocks": blocks.num_total_blocks,
            }
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    asyncio.run(_serve(float(sys.argv[1]), json.loads(sys.argv[2])))
