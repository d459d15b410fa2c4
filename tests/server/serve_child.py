"""A whole server as a process, on the counting engine: for signals. Prints its port and engine's pid.

Started as `python serve_child.py MODEL SETTINGS_JSON ENGINE_COMMAND...`; ends with run_server's status.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from headrace.server import logs
from headrace.server.app import RunningServer, run_server
from headrace.server.config import ServerConfig


def main() -> None:
    model, settings, *engine_command = sys.argv[1:]
    options: dict[str, Any] = json.loads(settings)
    config = ServerConfig(**{"model": model, "model_name": "tiny", "port": 0, **options})
    logs.configure(config.log_format)
    tasks: list[asyncio.Future[None]] = []

    def on_listen(running: RunningServer) -> None:
        print(json.dumps({"port": running.port}), flush=True)
        tasks.append(asyncio.ensure_future(_tell_ready(running)))

    sys.exit(run_server(config, on_listen, engine_command=engine_command))


async def _tell_ready(running: RunningServer) -> None:
    await running.wait_ready()
    print(json.dumps({"engine": running.host.supervisor.pid}), flush=True)


if __name__ == "__main__":
    main()
