"""The end of a driver that does the work: one JSON command a line on stdin, one JSON answer a line on stdout.

Every drive_*.py beside this file hands its operations to `serve`; `bench.peers.process` is the other end. Standard
library only, because it runs in each peer's own environment.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(hello: Callable[[], dict[str, Any]], operations: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Says hello (after loading), then carries out commands until stdin ends. An error is answered, never fatal.

    Whatever a library prints goes to stderr: stdout belongs to the protocol alone.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(work: Callable[[], dict[str, Any]]) -> None:
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:400]}
        answers.write(json.dumps(result) + "\n")

    answer(hello)
    for line in sys.stdin:
        command = json.loads(line)
        answer(lambda command=command: operations[command.pop("op")](**command))
