"""llama.cpp's logits over token windows: python drive_llama_logits.py MODEL.gguf THREADS; see protocol.py.

Runs the Python side of llama-cpp-python on the library of the bench's own build (LLAMA_CPP_LIB_PATH, PYTHONPATH).
"""

from __future__ import annotations

import sys
from typing import Any

import llama_cpp
import numpy as np
from protocol import serve


class Driver:
    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads = path, threads

    def hello(self) -> dict[str, Any]:
        return {"versions": {"llama-cpp-python": llama_cpp.__version__}}

    def logits(self, windows: list[list[int]], out: str) -> dict[str, Any]:
        """Writes float32 [tokens, vocabulary] of window i to OUT/i.npy; every window starts from nothing."""
        width = max(map(len, windows))
        model = llama_cpp.Llama(
            self._path,
            n_ctx=width,
            n_batch=width,
            n_threads=self._threads,
            n_threads_batch=self._threads,
            logits_all=True,
            verbose=False,
        )
        for number, window in enumerate(windows):
            model.reset()
            model.eval(window)
            np.save(f"{out}/{number}.npy", np.array(model.scores[: len(window)], np.float32))
        return {"windows": len(windows)}


if __name__ == "__main__":
    driver = Driver(sys.argv[1], int(sys.argv[2]))
    serve(driver.hello, {"logits": driver.logits})
