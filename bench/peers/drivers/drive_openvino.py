"""openvino-genai's ContinuousBatchingPipeline: python drive_openvino.py MODEL.gguf THREADS [PROPERTY=VALUE]."""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import serve


class Driver:
    def __init__(self, path: str, threads: int, properties: dict[str, str]) -> None:
        self._path, self._options = path, {"INFERENCE_NUM_THREADS": threads, **properties}
        self._pipeline: Any = None
        self._next_id = 0

    def hello(self) -> dict[str, Any]:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.max_num_batched_tokens = 512
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(self._path, scheduler, "CPU", self._options)
        self.decode([[1] * 16], 4)
        return {"versions": {"openvino-genai": openvino_genai.__version__.split("-")[0]}}

    def _add(self, prompt: list[int], new: int) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        self._next_id += 1
        return self._pipeline.add_request(self._next_id, openvino.Tensor(np.array([prompt], np.int64)), config)

    def decode(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Steps until every stream has its first token, then times `new` more with all streams running.

        A few tokens more are allowed for: while the last prompts are read, the first streams decode already.
        """
        handles = [self._add(prompt, new + 2 + len(prompts)) for prompt in prompts]
        begin = time.perf_counter()
        waiting = list(handles)
        while waiting:
            self._pipeline.step()
            waiting = [handle for handle in waiting if not handle.can_read()]
        first = time.perf_counter()
        for _ in range(new):
            self._pipeline.step()
        seconds = time.perf_counter() - first
        while self._pipeline.has_non_finished_requests():
            for handle in handles:
                handle.stop()
            self._pipeline.step()
        return {"prefill_seconds": first - begin, "seconds": seconds, "steps": new}

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        handle = self._add(prompt, 1)
        begin = time.perf_counter()
        while not handle.can_read():
            self._pipeline.step()
        seconds = time.perf_counter() - begin
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return {"seconds": seconds}

    def greedy(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Tokens, to see that the file was read well."""
        handle = self._add(prompt, new)
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return {"tokens": [int(token) for token in handle.read_all()[0].generated_ids]}


if __name__ == "__main__":
    driver = Driver(sys.argv[1], int(sys.argv[2]), dict(text.split("=", 1) for text in sys.argv[3:]))
    serve(driver.hello, {"decode": driver.decode, "prefill": driver.prefill, "greedy": driver.greedy})
