"""ctranslate2 with int8 weights: python drive_ctranslate2.py MODEL_DIRECTORY THREADS; see protocol.py."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ctranslate2
from protocol import serve


class Driver:
    def __init__(self, directory: Path, threads: int) -> None:
        self._directory, self._threads = directory, threads
        self._generator: Any = None
        self._texts: list[str] = []

    def hello(self) -> dict[str, Any]:
        self._texts = json.loads((self._directory / "vocabulary.json").read_text())
        self._generator = ctranslate2.Generator(
            str(self._directory), device="cpu", compute_type="int8", intra_threads=self._threads, inter_threads=1
        )
        self._run([[1] * 16], 4)
        return {"versions": {"ctranslate2": ctranslate2.__version__}}

    def _run(self, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        texts = [[self._texts[token] for token in prompt] for prompt in prompts]
        begin = time.perf_counter()
        results = self._generator.generate_batch(
            texts, max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False
        )
        return time.perf_counter() - begin, [result.sequences_ids[0] for result in results]

    def decode(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """The difference of two runs: it has no call for one step."""
        first, _ = self._run(prompts, 1)
        whole, _ = self._run(prompts, new + 1)
        return {"prefill_seconds": first, "seconds": whole - first, "steps": new}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        return {"seconds": self._run([prompt], 1)[0]}

    def greedy(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Tokens, to see that the model was converted well."""
        return {"tokens": self._run([prompt], new)[1][0]}


if __name__ == "__main__":
    driver = Driver(Path(sys.argv[1]), int(sys.argv[2]))
    serve(driver.hello, {"decode": driver.decode, "prefill": driver.prefill, "greedy": driver.greedy})
