"""onnxruntime-genai in its own environment: python drive_onnxruntime.py MODEL_DIRECTORY THREADS; see protocol.py."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai
from protocol import serve


class Driver:
    def __init__(self, directory: Path, threads: int) -> None:
        self._directory, self._threads = directory, threads
        self._model: Any = None

    def hello(self) -> dict[str, Any]:
        import json

        # The thread count is a setting of the model's directory, so a directory of links with its own settings is made.
        with tempfile.TemporaryDirectory() as folder:
            for file in self._directory.iterdir():
                if file.name != "genai_config.json":
                    (Path(folder) / file.name).symlink_to(file)
            config = json.loads((self._directory / "genai_config.json").read_text())
            config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = self._threads
            (Path(folder) / "genai_config.json").write_text(json.dumps(config))
            self._model = onnxruntime_genai.Model(folder)
        self._run([[1] * 16], 4)
        return {"versions": {"onnxruntime-genai": onnxruntime_genai.__version__}}

    def _run(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        """Prefill, one token, then `new` more: each of those is one pass over the model."""
        ids = np.array(prompts, np.int32)
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        length = ids.shape[1] + new + 1
        parameters.set_search_options(do_sample=False, max_length=length, min_length=length, batch_size=len(prompts))
        generator = onnxruntime_genai.Generator(self._model, parameters)
        begin = time.perf_counter()
        generator.append_tokens(ids if len(prompts) > 1 else ids[0])
        generator.generate_next_token()
        first = time.perf_counter()
        steps = 0
        while steps < new and not generator.is_done():
            generator.generate_next_token()
            steps += 1
        return {"prefill_seconds": first - begin, "seconds": time.perf_counter() - first, "steps": steps}

    def decode(self, prompts: list[list[int]], new: int) -> dict[str, Any]:
        return self._run(prompts, new)

    def prefill(self, prompt: list[int]) -> dict[str, Any]:
        return {"seconds": self._run([prompt], 0)["prefill_seconds"]}

    def greedy(self, prompt: list[int], new: int) -> dict[str, Any]:
        """Tokens, to see that the model was converted well."""
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=len(prompt) + new)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return {"tokens": [int(token) for token in generator.get_sequence(0)[len(prompt) :]]}


if __name__ == "__main__":
    driver = Driver(Path(sys.argv[1]), int(sys.argv[2]))
    serve(driver.hello, {"decode": driver.decode, "prefill": driver.prefill, "greedy": driver.greedy})
