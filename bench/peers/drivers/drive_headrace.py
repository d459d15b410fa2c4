"""Our engine as a server's engine process builds it: python drive_headrace.py MODEL THREADS [--NAME VALUE ...].

NAMEs are settings of ServerConfig, such as --max-num-seqs 256; see protocol.py for what goes over stdin and stdout.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from headrace.engine.types import SamplingParams, SequenceRequest
from headrace.kernels.program import Linear
from headrace.models.checkpoint import open_checkpoint
from headrace.server import engine_main
from headrace.server.cli import hardware
from headrace.server.config import ServerConfig
from headrace.server.model_host import load_frame
from protocol import serve
from windows import window_logits


class Driver:
    def __init__(self, path: Path, threads: int, settings: dict[str, int]) -> None:
        self._path = path
        self._config = ServerConfig(model=str(path), num_threads=threads, **settings)
        self._engine: Any = None
        self._next_id = 1

    def hello(self) -> dict[str, Any]:
        built = engine_main.build_engine(load_frame(self._config, self._path), lambda _: None)
        self._engine = built.engine
        self.decode([[1] * 16], 4)
        return {"versions": hardware.versions(), "backend": built.backend, **self._work()}

    def _work(self) -> dict[str, int]:
        """What one token costs: multiply-adds in matrices, and the bytes of them in the file."""
        checkpoint = open_checkpoint(self._path)
        try:
            weights = [op.weight for op in checkpoint.program.ops if isinstance(op, Linear)]
            shapes = {spec.name: spec.shape for spec in checkpoint.program.weights}
            return {
                "weight_bytes": sum(checkpoint.tensors[name].nbytes for name in set(weights)),
                "multiply_adds": sum(math.prod(shapes[name]) for name in weights),
                "vocab_size": checkpoint.config.vocab_size,
            }
        finally:
            checkpoint.close()

    def _add(self, prompt: list[int], new: int) -> int:
        sampling = SamplingParams(max_tokens=new, temperature=0.0)
        self._engine.add(SequenceRequest(self._next_id, prompt, sampling, arrival=time.monotonic()))
        self._next_id += 1
        return self._next_id - 1

    def decode(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Steps until every stream has its first token, then times `new` more with all streams running.

        A stream that has its first token is parked while the last prompts are read, so that all are equally long then,
        as the peers' are.
        """
        begin = time.perf_counter()
        waiting = ids = {self._add(prompt, new + 2) for prompt in prompts}
        while waiting:
            begun = {output.id for output in self._engine.step() if output.tokens}
            waiting = waiting - begun
            for sequence_id in begun:
                self._engine.park(sequence_id)
        for sequence_id in ids:
            self._engine.unpark(sequence_id)
        self._engine.step()  # takes them all in
        first = time.perf_counter()
        tokens = sum(len(output.tokens) for _ in range(new) for output in self._engine.step())
        seconds = time.perf_counter() - first
        for sequence_id in ids:
            self._engine.cancel(sequence_id)
        while self._engine.has_work():
            self._engine.step()
        if tokens != new * len(prompts):
            raise RuntimeError(f"{tokens} tokens in {new} steps of {len(prompts)} streams")
        return {"prefill_seconds": first - begin, "seconds": seconds, "steps": new}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        begin = time.perf_counter()
        self._add(prompt, 1)
        while self._engine.has_work():
            self._engine.step()
        return {"seconds": time.perf_counter() - begin}

    def greedy(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Tokens, to compare with what the peers say."""
        self._add(prompt, new)
        tokens: list[int] = []
        while self._engine.has_work():
            for output in self._engine.step():
                tokens += [token.token_id for token in output.tokens]
        return {"tokens": tokens}

    def logits(self, windows: list[list[int]], out: str) -> dict[str, Any]:
        """Writes float32 [tokens, vocabulary] of window i to OUT/i.npy."""
        executor = self._engine._executor  # the engine itself never hands out logits
        for number, window in enumerate(windows):
            np.save(f"{out}/{number}.npy", window_logits(executor, window, self._config.block_size))
        return {"windows": len(windows)}


if __name__ == "__main__":
    pairs = zip(sys.argv[3::2], sys.argv[4::2], strict=True)
    settings = {name.removeprefix("--").replace("-", "_"): int(value) for name, value in pairs}
    driver = Driver(Path(sys.argv[1]), int(sys.argv[2]), settings)
    operations = {"decode": driver.decode, "prefill": driver.prefill, "greedy": driver.greedy, "logits": driver.logits}
    serve(driver.hello, operations)
