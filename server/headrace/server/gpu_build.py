"""Builds the engine of the triton back end: what fits the GPU's memory, the weights streamed to it, the KV blocks from
what is left, the kernels compiled and the decode steps captured before the first request. Called by engine_build.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from headrace.engine.engine import Engine
from headrace.kernels.gpu import device, memory, quantization
from headrace.kernels.gpu.attention import AttentionName
from headrace.kernels.gpu.executor import GpuExecutor, GpuOptions
from headrace.kernels.gpu.ops import WeightForm, form_of
from headrace.kernels.gpu.shape import StepLimits
from headrace.kernels.program import StepProgram
from headrace.kernels.quant import Weight
from headrace.models.checkpoint import Checkpoint, open_checkpoint
from headrace.models.errors import ModelError
from headrace.models.load import model_info
from headrace.server import backends, frames
from headrace.server.engine_build import Built, engine_config, wanted_blocks

log = logging.getLogger("headrace.engine")

_BLOCK_SIZE = 64  # the KV tile of the attention kernels
_INTERPRETED_BLOCK_SIZE = 16  # as on a CPU: contexts of tests are short
_INTERPRETED_KV_BYTES = 64 << 20
_INTERPRETED_SWAP_BYTES = 4 << 20
_LEAST_TOKENS = 256  # of a KV cache that is worth serving with
_LOADING = 0.8  # share of the progress that is loading; the rest is warming up


def build_triton(load: frames.Load, on_progress: Callable[[float], None]) -> Built:
    """As `engine_build.build_engine`, for the triton back end. Raises ModelError."""
    checkpoint = open_checkpoint(Path(load.path))
    try:
        return _build(load, checkpoint, on_progress)
    except (memory.GpuMemoryError, device.GpuUnavailableError) as error:
        raise ModelError(str(error)) from None
    except ValueError as error:
        raise ModelError(f"the triton back end cannot run this model ({error}); --backend native can") from None
    finally:
        checkpoint.close()


def _build(load: frames.Load, checkpoint: Checkpoint, on_progress: Callable[[float], None]) -> Built:
    is_interpreted = device.interprets()
    block_size = load.block_size or (_INTERPRETED_BLOCK_SIZE if is_interpreted else _BLOCK_SIZE)
    info = model_info(checkpoint, ())
    options = _options(load, is_interpreted)
    limits = _limits(load, info.context_length, block_size)
    weights = _CheckpointWeights(checkpoint)
    executor = GpuExecutor(
        checkpoint.program,
        weights,
        limits,
        options,
        forms=quantization.quantized_forms(checkpoint.program, _forms(checkpoint), load.quantization),
        on_progress=lambda share: on_progress(_LOADING * share),
    )
    fitting = executor.num_kv_blocks(load.gpu_memory_fraction, -(-_LEAST_TOKENS // block_size))
    if load.kv_cache_bytes or is_interpreted:
        wanted = load.kv_cache_bytes or _INTERPRETED_KV_BYTES
        fitting = min(fitting, max(2, wanted // executor.kv_block_bytes))
    num_blocks = wanted_blocks(load, block_size) or fitting
    config = engine_config("triton", load, info, block_size=block_size, num_blocks=num_blocks)
    executor.allocate_kv(num_blocks)
    swap_space = min(load.swap_space_bytes, _INTERPRETED_SWAP_BYTES) if is_interpreted else load.swap_space_bytes
    num_host_blocks = executor.allocate_host(swap_space)
    begin = time.monotonic()
    executor.warm_up(lambda share: on_progress(_LOADING + (1.0 - _LOADING) * share))
    log.info("warm in %.1f s: %s", time.monotonic() - begin, executor.summary())
    config = replace(config, num_host_blocks=num_host_blocks, min_swap_tokens=executor.min_swap_tokens)
    on_progress(1.0)
    return Built(Engine(executor, config), executor.name, 1, config.max_sequence_len)


def _limits(load: frames.Load, context: int, block_size: int) -> StepLimits:
    return StepLimits(
        max_tokens=backends.token_budget("triton", load.max_num_batched_tokens, load.max_num_seqs),
        max_seqs=load.max_num_seqs,
        max_logit_rows=max(load.max_num_seqs, 256),
        max_model_len=min(load.max_model_len or context, context),
        block_size=block_size,
    )


def _options(load: frames.Load, is_interpreted: bool) -> GpuOptions:
    """The precisions: keys and values are kept in the compute dtype unless 8 bits were asked for.

    bf16 has the range that every model was trained in. With an fp8 cache activations are fp16, which e4m3 converts to
    exactly and in one instruction. The interpreter computes in fp32, so that tests can hold it against the reference.
    """
    compute, kv = load.compute_dtype, load.kv_dtype
    if kv in ("fp32", "fp16", "bf16") and compute not in ("auto", kv):
        raise ModelError(f"on a GPU keys and values are kept in the compute dtype or 8 bits, not {kv} with {compute}")
    if compute == "auto":
        compute = (
            kv if kv in ("fp32", "fp16", "bf16") else "fp32" if is_interpreted else "fp16" if kv == "fp8" else "bf16"
        )
    return GpuOptions(
        compute_dtype=cast(memory.ComputeDtype, compute),
        kv_dtype=cast(memory.GpuKvDtype, compute if kv == "auto" else kv),
        device="cpu" if is_interpreted else "cuda",
        attention=cast(AttentionName, load.attention),
    )


class _CheckpointWeights(Mapping[str, Weight]):
    """Reads a weight whenever it is looked up: none stays in host memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Weight:
        return self._checkpoint.load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(spec.name for spec in self._checkpoint.program.weights)

    def __len__(self) -> int:
        return len(self._checkpoint.program.weights)


def _forms(checkpoint: Checkpoint) -> dict[str, WeightForm]:
    """The form of every matrix. It follows from the type in the file: the smallest matrix of each type is loaded."""
    program: StepProgram = checkpoint.program
    known: dict[str, WeightForm] = {}
    forms = {}
    matrices = [spec for spec in program.weights if len(spec.shape) == 2]
    for spec in sorted(matrices, key=lambda spec: checkpoint.tensors[spec.name].nbytes):
        type_name = checkpoint.tensors[spec.name].type_name
        if type_name not in known:
            known[type_name] = form_of(checkpoint.load(spec.name))
        forms[spec.name] = known[type_name]
    return forms
