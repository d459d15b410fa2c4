"""What the end-to-end tests of the GPU back end share: executors on tiny models, on whatever runs the kernels."""

from __future__ import annotations

from typing import Any

import torch
from headrace.kernels.gpu.executor import GpuExecutor, GpuOptions
from headrace.kernels.gpu.shape import StepLimits
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import LoadedModel

BLOCK = 16  # the smallest that the kernels take: blocks end inside a test's few tokens
NUM_BLOCKS = 14
# In float32 the kernels differ from the torch reference by the order of their sums alone.
TOLERANCE = 5e-5


def gpu_executor(model: LoadedModel, device: str, num_blocks: int = NUM_BLOCKS, **options: Any) -> GpuExecutor:
    """An executor in float32 unless told otherwise, with its KV blocks allocated and, on a GPU, its graphs captured."""
    limits = StepLimits(max_tokens=48, max_seqs=6, max_logit_rows=48, max_model_len=128, block_size=BLOCK)
    chosen = GpuOptions(**{"compute_dtype": "fp32", "kv_dtype": "fp32", "device": device, **options})
    executor = GpuExecutor(model.program, model.weights, limits, chosen)
    executor.allocate_kv(num_blocks)
    executor.warm_up()
    return executor


def torch_executor(model: LoadedModel, num_blocks: int = NUM_BLOCKS) -> TorchExecutor:
    """The reference."""
    return TorchExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=BLOCK)


def is_nan_free(executor: GpuExecutor) -> bool:
    """Whether no KV block of the executor holds NaN."""
    caches = executor._runner.caches
    return not any(torch.isnan(t.float()).any() for layer in caches for t in (layer.k, layer.v))
