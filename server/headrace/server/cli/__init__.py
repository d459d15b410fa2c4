"""The `headrace` command. `main` is the entry point of the console script; everything else is imported when needed.

Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 3 server not reachable or not ready, 130 interrupted.
"""

from __future__ import annotations


def main() -> int:
    """Runs the command line and returns the exit status."""
    from headrace.server.cli.app import run

    return run()
