"""A step launches kernels and copies, and nothing else: no op of torch's computes, and nothing asks the device for a
number, which would wait for it. Every op that reaches torch's dispatcher during `submit` is looked at.

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.runtime.interpreter as stock
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.models.load import load_model
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import TinyModels
from tests.gpu.e2e.support import BLOCK, gpu_executor
from tests.support.stepping import step_batch

# Views, which touch no memory.
VIEWS = {"alias", "as_strided", "detach", "expand", "select", "slice", "split", "unsqueeze", "view", "_unsafe_view"}
# The batch to the device, tokens to where the next step finds them, results to the host.
COPIES = {"copy_"}


class Watched(TorchDispatchMode):
    """Counts ops by name, but for those of the interpreter inside a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.waits: list[str] = []
        self.is_launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if not self.is_launching:
            name = func.overloadpacket.__name__
            self.ops[name] += 1
            if name == "copy_" and args[0].device != args[1].device and not args[2]:
                self.waits.append(f"{args[1].device} to {args[0].device}")
        return func(*args, **(kwargs or {}))


def watch(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> Watched:
    mode = Watched()
    launch = stock.GridExecutor.__call__

    def launch_unwatched(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode.is_launching = True
        try:
            return launch(self, *args, **kwargs)
        finally:
            mode.is_launching = False

    monkeypatch.setattr(stock.GridExecutor, "__call__", launch_unwatched)
    with mode:
        run()
    return mode


def steps() -> list[StepBatch]:
    """Two prompts, most of whose logits nobody wants; decode rows, sampled in every way, one from a result that is
    still in flight."""
    prefill = step_batch([([7, 11, 3], 0, [9]), ([42, 43], 0, [4])], BLOCK, last_only=True)
    decode = step_batch([([1], 3, [9]), ([45], 2, [4])], BLOCK)
    sampling = (
        RowSampling(temperature=0.9, top_k=9, top_p=0.8, seed=3, position=4, num_logprobs=3),
        RowSampling(presence_penalty=1.0, output_ids=[5, 6], logit_bias=((3, 1.0),), position=3),
    )
    pending = decode.token_ids.copy()
    pending[0] = -1
    return [prefill, replace(decode, sampling=sampling, token_ids=pending)]


@pytest.mark.timeout(600)  # gemma's vocabulary takes the interpreter seconds
@pytest.mark.parametrize("architecture", ["llama-smallest", "qwen3", "gemma3-capped"])
def test_a_step_is_launches_and_copies(
    tiny_models: TinyModels, device: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = gpu_executor(load_model(tiny_models.gguf(architecture)), device)
    for batch in steps():  # what is made once, at first use, is there
        executor.execute(batch)

    def run() -> None:
        for batch in steps():
            executor.submit(batch)

    watched = watch(run, monkeypatch)
    assert set(watched.ops) <= VIEWS | COPIES, sorted(set(watched.ops) - VIEWS - COPIES)
    assert not watched.waits
    assert watched.ops["copy_"] == 3 * len(steps())
    for batch in steps():
        assert len(executor.collect()) == len(batch.logit_rows)


def test_what_waits_or_computes_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(4, device=device)
    for harm, name in (
        (lambda: x[0].item(), "_local_scalar_dense"),
        (lambda: x.nonzero(), "nonzero"),
        (lambda: x + x, "add"),
        (lambda: x.half(), "_to_copy"),
    ):
        assert name in watch(harm, monkeypatch).ops
