"""The torch executor where it is more than the sum of its ops: checks, order of rows, isolation, memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from headrace.kernels.batch import RowSampling
from headrace.kernels.program import (
    Embed,
    KvLayout,
    KvWrite,
    Linear,
    PagedAttention,
    SelectRows,
    StepProgram,
    WeightSpec,
)
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.stepping import logits_in_chunks, step_batch

BLOCK = 4


@pytest.fixture(scope="module")
def model(tiny_llama_gguf: Path) -> LoadedModel:
    return load_model(tiny_llama_gguf)


def make(model: LoadedModel, num_blocks: int = 12) -> TorchExecutor:
    return TorchExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=BLOCK)


def test_results_follow_logit_rows(model: LoadedModel) -> None:
    batch = step_batch([([5, 6, 7], 0, [2]), ([8, 9], 0, [4])], BLOCK)
    everything = make(model).forward(batch)
    some = replace(batch, logit_rows=np.array([0, 2, 4], np.int32), sampling=(RowSampling(),) * 3)
    executor = make(model)
    np.testing.assert_allclose(executor.forward(some), everything[[0, 2, 4]], rtol=1e-4, atol=1e-5)
    assert [result.token_id for result in executor.execute(some)] == everything[[0, 2, 4]].argmax(1).tolist()


def test_a_step_may_want_no_logits(model: LoadedModel) -> None:
    executor = make(model)
    batch = step_batch([([5, 6, 7], 0, [2])], BLOCK)
    assert executor.execute(replace(batch, logit_rows=np.zeros(0, np.int32), sampling=())) == []
    after = executor.forward(step_batch([([8], 3, [2])], BLOCK))
    want = logits_in_chunks(make(model), [5, 6, 7, 8], 4, [7], BLOCK)[-1:]
    np.testing.assert_allclose(after, want, rtol=1e-4, atol=1e-5)


def test_what_a_freed_block_holds_reaches_nobody(tiny_models: TinyModels) -> None:
    """A sequence of NaN (a fault of the model) leaves its blocks to others, which run beside it and after it."""
    model = load_model(tiny_models.gguf("llama3"))  # its output head is not the embedding
    weights = dict(model.weights)
    table = np.array(weights["token_embd.weight"])
    table[9] = np.nan
    weights["token_embd.weight"] = table
    executor = TorchExecutor(model.program, weights, num_blocks=4, block_size=BLOCK)
    clean = executor.forward(step_batch([([5, 6], 0, [0])], BLOCK))
    beside = executor.execute(step_batch([([9, 9, 9, 9], 0, [2]), ([5, 6], 0, [0])], BLOCK, last_only=True))
    assert [result.is_finite for result in beside] == [False, True]
    after = executor.forward(step_batch([([5, 6], 0, [2])], BLOCK))
    np.testing.assert_allclose(after, clean, rtol=1e-4, atol=1e-5)
    decode = executor.execute(step_batch([([7], 2, [2]), ([7], 2, [0]), ([5], 0, [3])], BLOCK))
    assert all(result.is_finite for result in decode)


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_wrong_weights_are_refused_by_name(model: LoadedModel, fault: str) -> None:
    weights = dict(model.weights)
    if fault == "missing":
        del weights["blk.1.ffn_up.weight"]
    else:
        weights["blk.1.ffn_up.weight"] = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight"):
        TorchExecutor(model.program, weights, num_blocks=2, block_size=BLOCK)


def test_mapped_weights_are_used_in_place_and_untouched_blocks_cost_nothing(model: LoadedModel) -> None:
    before = psutil.Process().memory_info().rss
    executor = make(model, num_blocks=1 << 16)  # 3 layers x 2 x 256 MiB of KV blocks
    executor.forward(step_batch([([5, 6, 7], 0, [60_000])], BLOCK))
    assert psutil.Process().memory_info().rss - before < 64 << 20
    mine = executor._weights["blk.0.ffn_up.weight"].numpy()
    assert np.shares_memory(mine, model.weights["blk.0.ffn_up.weight"])


def test_name_says_library_and_device(model: LoadedModel) -> None:
    assert make(model).name == "torch-cpu"


def test_layers_may_differ_in_window_and_shape() -> None:
    """A hand-made program: two attention layers of different geometry over one embedding."""
    rng = np.random.default_rng(0)
    program = StepProgram(
        buffers=(),
        ops=(
            Embed("x", "table", 1.0),
            KvWrite(0, "x", "x"),
            PagedAttention("a", "x", 0, num_heads=2, num_kv_heads=2, head_dim=4, scale=0.5, window=1),
            KvWrite(1, "a", "a"),
            PagedAttention("b", "a", 1, num_heads=1, num_kv_heads=1, head_dim=8, scale=0.5),
            SelectRows("last", "b"),
            Linear("logits", "last", "head"),
        ),
        weights=(WeightSpec("table", (6, 8)), WeightSpec("head", (6, 8))),
        kv=(KvLayout(2, 4, window=1), KvLayout(1, 8)),
        vocab_size=6,
    )
    table, head = rng.standard_normal((2, 6, 8)).astype(np.float32)
    executor = TorchExecutor(program, {"table": table, "head": head}, num_blocks=3, block_size=BLOCK)
    tokens = [1, 5, 2, 0, 3]
    got = logits_in_chunks(executor, tokens, 5, [2, 0], BLOCK)
    x = table[tokens].astype(np.float64)  # with a window of one, the first layer passes its values through
    scores = np.where(np.tri(5, dtype=bool), x @ x.T * 0.5, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    want = (weights / weights.sum(1, keepdims=True)) @ x @ head.T.astype(np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
