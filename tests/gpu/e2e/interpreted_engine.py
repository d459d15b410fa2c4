"""The engine process of the end-to-end tests: the server's own in the corrected interpreter, twice as quick as Triton's
(test_cli.py runs that one), which reports reads outside of a tensor. On a GPU it is the server's own as it is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.path.insert(0, str(Path(__file__).parents[3]))
        from tests.gpu.interpreter import install

        install()
    from headrace.server import engine_main

    engine_main.main()
