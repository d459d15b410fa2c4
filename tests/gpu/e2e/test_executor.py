"""The whole executor against the torch reference: architectures, quantised weights, 8-bit KV, padding, pending ids.

In float32 the tolerance (support.TOLERANCE) is absolute, on logits of a few units.

A GPU, or Triton's interpreter only: ttsem has no driver that the executor could ask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from headrace.kernels.batch import PipelinedExecutor, RowSampling, StepBatch
from headrace.kernels.gpu import warm
from headrace.kernels.gpu.graphs import DecodeGraphs
from headrace.kernels.gpu.lower import LowerOptions
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.gpu.e2e.support import BLOCK, NUM_BLOCKS, TOLERANCE, gpu_executor, torch_executor
from tests.support.stepping import step_batch

CASES = [
    ("llama-smallest", "F32"),
    ("llama-smallest", "Q4_1"),
    ("qwen2-wide", "Q8_0"),
    ("qwen3", "Q4_0"),
    ("gemma3-capped", "Q8_0"),
]


@pytest.fixture(scope="module")
def smallest(tiny_models: TinyModels) -> LoadedModel:
    return load_model(tiny_models.gguf("llama-smallest"))


def steps() -> list[StepBatch]:
    """Two prompts; a chunk of one beside a decode row of the other; decode rows of both, in permuted blocks."""
    return [
        step_batch([([7, 11, 3, 99, 5], 0, [9]), ([42, 43], 0, [4])], BLOCK, last_only=True),
        step_batch([([44], 2, [4]), ([9, 8, 7] * 5, 5, [9, 2])], BLOCK, last_only=True),
        step_batch([([1], 20, [9, 2]), ([45], 3, [4])], BLOCK),
    ]


@pytest.mark.parametrize(("architecture", "quantization"), CASES)
def test_logits_are_those_of_the_reference(
    tiny_models: TinyModels, device: str, architecture: str, quantization: str
) -> None:
    model = load_model(tiny_models.gguf(architecture, quantization))
    executor, reference = gpu_executor(model, device), torch_executor(model)
    for batch in steps():
        want = reference.forward(batch)
        np.testing.assert_allclose(executor.forward(batch), want, rtol=0, atol=TOLERANCE)


def test_norms_and_rope_by_themselves_mean_the_same(smallest: LoadedModel, device: str) -> None:
    options = LowerOptions(has_norm_prologue=False, has_rope_epilogue=False)
    executor, reference = gpu_executor(smallest, device, lowering=options), torch_executor(smallest)
    for batch in steps():
        np.testing.assert_allclose(executor.forward(batch), reference.forward(batch), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("compute", "kv", "tolerance"),
    [("fp16", "fp16", 0.005), ("bf16", "bf16", 0.04), ("fp16", "fp8", 0.15), ("bf16", "int8", 0.15)],
)
def test_smaller_types_stay_close(smallest: LoadedModel, device: str, compute: str, kv: str, tolerance: float) -> None:
    """tolerance: of the error's norm, as a share of the logits'."""
    executor, reference = gpu_executor(smallest, device, compute_dtype=compute, kv_dtype=kv), torch_executor(smallest)
    for batch in steps():
        want = reference.forward(batch)
        error = np.linalg.norm(executor.forward(batch) - want) / np.linalg.norm(want)
        assert error < tolerance


def test_tokens_and_logprobs_are_those_of_the_reference(smallest: LoadedModel, device: str) -> None:
    executor, reference = gpu_executor(smallest, device), torch_executor(smallest)
    prompts = step_batch([([7, 11, 3], 0, [9]), ([42], 0, [4]), ([5, 6], 0, [5]), ([8], 0, [6])], BLOCK, last_only=True)
    sampling = (
        RowSampling(num_logprobs=3, position=3),
        RowSampling(temperature=0.9, seed=2**63 + 5, position=1, num_logprobs=0),
        RowSampling(temperature=1.2, top_k=20, top_p=0.8, seed=4, position=2, presence_penalty=1.0, output_ids=[5, 6]),
        RowSampling(target=77, position=1, num_logprobs=0),
    )
    batch = replace(prompts, sampling=sampling)
    for got, want in zip(executor.execute(batch), reference.execute(batch), strict=True):
        assert (got.token_id, got.is_finite) == (want.token_id, True)
        np.testing.assert_allclose(got.logprob, want.logprob, atol=1e-4)
        assert [token for token, _ in got.top] == [token for token, _ in want.top]


def test_a_step_may_want_no_logits(smallest: LoadedModel, device: str) -> None:
    executor, reference = gpu_executor(smallest, device), torch_executor(smallest)
    batch = replace(steps()[0], logit_rows=np.zeros(0, np.int32), sampling=())
    assert executor.execute(batch) == []
    reference.execute(batch)
    after = steps()[1]
    np.testing.assert_allclose(executor.forward(after), reference.forward(after), rtol=0, atol=TOLERANCE)


def test_a_token_in_flight_is_named_by_its_row(smallest: LoadedModel, device: str) -> None:
    """Two steps are queued before one is collected; the second starts from what the first samples, penalties too."""
    executor = gpu_executor(smallest, device)
    assert isinstance(executor, PipelinedExecutor)
    first = step_batch([([7, 11, 3], 0, [9]), ([42, 43], 0, [4])], BLOCK, last_only=True)
    first = replace(first, sampling=(RowSampling(position=3, num_logprobs=0), RowSampling(position=2, num_logprobs=0)))
    known = executor.execute(first)
    tokens = [result.token_id for result in known]
    sampling = (
        RowSampling(frequency_penalty=100.0, output_ids=[tokens[1]], position=3, num_logprobs=0),
        RowSampling(position=4, num_logprobs=2),
    )
    second = step_batch([([tokens[1]], 2, [4]), ([tokens[0]], 3, [9])], BLOCK)
    want = executor.execute(replace(second, sampling=sampling))

    executor = gpu_executor(smallest, device)
    executor.submit(first)
    pending = replace(second, token_ids=np.array([-2, -1], np.int32))
    executor.submit(replace(pending, sampling=(replace(sampling[0], output_ids=[]), sampling[1])))
    with pytest.raises(RuntimeError, match="in flight"):
        executor.submit(first)
    assert executor.collect() == known
    assert executor.collect() == want
    assert want[0].token_id != tokens[1]


def test_rows_are_bit_equal_whatever_runs_beside_them(smallest: LoadedModel, device: str) -> None:
    """On a GPU this goes through graphs of other sizes, whose padding rows must reach nobody."""
    alone = step_batch([([7], 3, [9])], BLOCK)
    prompt = step_batch([([1, 2, 3], 0, [9])], BLOCK, last_only=True)
    others = [([5 + i], i, [2 + i]) for i in range(4)]
    crowd = step_batch([*others[:2], ([7], 3, [9]), *others[2:]], BLOCK)
    executor = gpu_executor(smallest, device)
    executor.forward(prompt)
    want = executor.forward(alone)[0]
    for block in range(2, 6):
        executor.poison(block)
    executor.forward(step_batch([([8] * 2, 0, [2 + i]) for i in range(4)], BLOCK, last_only=True))
    np.testing.assert_array_equal(executor.forward(crowd)[2], want)


@pytest.mark.parametrize(("architecture", "quantization"), [("llama-smallest", "Q4_1"), ("qwen3", "F32")])
def test_rows_are_bit_equal_whichever_step_they_come_in(
    tiny_models: TinyModels, device: str, architecture: str, quantization: str
) -> None:
    """A prompt at once, in chunks, behind a prefix hit, token by token: what recomputing after preemption and resuming
    on another replica rely on."""
    executor = gpu_executor(load_model(tiny_models.gguf(architecture, quantization)), device)
    ids = [(7 * i + 3) % 90 for i in range(37)]
    want = executor.forward(step_batch([(ids, 0, [9, 2, 4])], BLOCK))
    whole = executor.forward(step_batch([(ids, 0, [1, 6, 5])], BLOCK, last_only=True))
    np.testing.assert_array_equal(whole[0], want[-1])  # rows of logits selected early
    hit = executor.forward(step_batch([(ids[16:], 16, [9, 7, 8])], BLOCK))
    np.testing.assert_array_equal(hit, want[16:])
    for begin, end in ((0, 5), (5, 33), (33, 34), (34, 35), (35, 37)):
        chunk = executor.forward(step_batch([(ids[begin:end], begin, [3, 10, 11])], BLOCK))
        np.testing.assert_array_equal(chunk, want[begin:end], f"rows {begin} to {end}")


class EagerGraphs(DecodeGraphs):
    """Graphs without CUDA: a captured step is run again."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[int, Callable[[], None]] = {}
        self.replayed: list[int] = []

    def capture(self, size: int, run: Callable[[], None]) -> None:
        run()
        self.runs[size] = run
        self._sizes = sorted(self.runs)

    def replay(self, size: int) -> None:
        self.replayed.append(size)
        self.runs[size]()


def test_decode_steps_are_padded_to_a_captured_size(smallest: LoadedModel, device: str) -> None:
    executor, reference = gpu_executor(smallest, device), torch_executor(smallest)
    graphs = executor._graphs = EagerGraphs()
    executor.capture_decode()
    assert sorted(graphs.runs) == [1, 2, 4, 6]
    for block in range(NUM_BLOCKS):
        executor.poison(block)
    first, second, third = steps()
    sampling = tuple(RowSampling(position=21 - 17 * row, num_logprobs=1) for row in range(2))
    three = step_batch([([2], 21, [9, 2]), ([46], 4, [4]), ([5], 0, [6])], BLOCK)
    for batch in (first, second, replace(third, sampling=sampling), three):
        want = reference.forward(batch)
        np.testing.assert_allclose(executor.forward(batch), want, rtol=0, atol=TOLERANCE)
        got = executor.execute(batch)
        assert [result.token_id for result in got] == want.argmax(1).tolist()
        assert all(result.is_finite for result in got)
    assert graphs.replayed == [2, 2, 4, 4]


def test_freed_blocks_reach_nobody(smallest: LoadedModel, device: str) -> None:
    executor, reference = gpu_executor(smallest, device), torch_executor(smallest)
    for block in range(14):
        executor.poison(block)
    for batch in steps():
        np.testing.assert_allclose(executor.forward(batch), reference.forward(batch), rtol=0, atol=TOLERANCE)


def test_nan_is_charged_to_its_own_row(smallest: LoadedModel, device: str) -> None:
    executor = gpu_executor(smallest, device)
    executor.poison(9)
    batch = step_batch([([7], 3, [9]), ([5, 6], 0, [4])], BLOCK, last_only=True)
    assert [result.is_finite for result in executor.execute(batch)] == [False, True]


def test_what_does_not_fit_is_refused_before_anything_runs(smallest: LoadedModel, device: str) -> None:
    executor = gpu_executor(smallest, device)
    with pytest.raises(ValueError, match="49 tokens"):
        executor.execute(step_batch([([1] * 49, 0, [0, 1, 2, 3])], BLOCK, last_only=True))
    executor.execute(steps()[0])


def test_what_warms_up_leaves_nothing_behind(smallest: LoadedModel, device: str) -> None:
    """The steps that compile all variants run on the null block alone, and through every way to sample."""
    executor, reference = gpu_executor(smallest, device), torch_executor(smallest)
    limits = replace(executor.limits, max_tokens=17)
    for batch in warm.warm_up_batches(limits, null_block=NUM_BLOCKS):
        limits.check(batch)
        assert all(result.is_finite for result in executor.execute(batch))
    for batch in steps():
        np.testing.assert_allclose(executor.forward(batch), reference.forward(batch), rtol=0, atol=TOLERANCE)
