"""Builds the engine that the engine process steps: the model from its files, the executor of the chosen back end, the
limits. Called by engine_main with what the front end's Load frame says, and by the benches.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.kernels.native import library
from headrace.kernels.native.executor import NativeExecutor
from headrace.kernels.program import StepProgram
from headrace.models.errors import ModelError
from headrace.models.load import ModelInfo, load_model
from headrace.models.packed import load_packed
from headrace.server import backends, frames, self_test
from headrace.server.cli import hardware

log = logging.getLogger("headrace.engine")

# What KV blocks may take where nothing is configured: enough for a few long contexts of a small model, never most of a
# machine.
_DEFAULT_KV_BYTES = 512 << 20
_CPU_BLOCK_SIZE = 16
_MIN_LOGIT_ROWS = 256


@dataclass(frozen=True)
class Built:
    """A loaded engine and what the front end wants to know of it."""

    engine: Engine
    backend: str
    num_threads: int
    max_model_len: int
    arithmetic: str = ""


def build_engine(load: frames.Load, on_progress: Callable[[float], None]) -> Built:
    """Load the model's weights and set up its engine. Raises ModelError with a message for the operator.

    on_progress is told the share of the weights read, 0 to 1.
    """
    choice = backends.choose(load.backend)
    log.log(logging.WARNING if choice.is_fallback else logging.INFO, "back end %s: %s", choice.name, choice.why)
    backends.check_quantization(choice.name, load.quantization)
    if choice.name == "triton":
        from headrace.server.gpu_build import build_triton  # imports torch and triton

        built = build_triton(load, on_progress)
        if not os.environ.get("TRITON_INTERPRET"):  # there it would take minutes
            _test(built, load)
        precision = f"{load.compute_dtype} kv={load.kv_dtype} quantization={load.quantization}"
        return replace(built, arithmetic=f"{built.backend} {version('headrace')} {precision}")
    kv_dtype = backends.choose_kv_dtype(choice.name, load.kv_dtype)
    build = _build_native if choice.name == "native" else _build_torch
    built = build(load, kv_dtype, on_progress)
    _test(built, load)
    return built


def _test(built: Built, load: frames.Load) -> None:
    """The self-test, on an engine of its own: nothing of it shows in the counts of the one that serves."""
    self_test.check(Engine(built.engine.executor, built.engine.config), Path(load.path))


def _build_native(load: frames.Load, kv_dtype: backends.KvDtype, on_progress: Callable[[float], None]) -> Built:
    model = load_packed(Path(load.path), on_progress)
    log.info("weights: %s", model.origin)
    config = _engine_config("native", load, model.program, model.info, kv_dtype)
    num_threads = _num_threads(load)
    try:
        executor = NativeExecutor(
            model.program,
            model.weights,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            num_threads=num_threads,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_logit_rows=config.max_logit_rows,
            kv_dtype=kv_dtype,
            activation_bits=load.activation_bits,
        )
    except ValueError as error:
        raise ModelError(f"the native back end cannot run this model ({error}); --backend torch can") from None
    # The bits do not depend on the instruction set, on threads or on the batch (decisions/0007).
    sources = library.load().hr_source_hash().decode()
    arithmetic = f"native {version('headrace')} {sources} kv={kv_dtype} activations={load.activation_bits}"
    return Built(Engine(executor, config), executor.name, num_threads, config.max_sequence_len, arithmetic)


def _build_torch(load: frames.Load, kv_dtype: backends.KvDtype, on_progress: Callable[[float], None]) -> Built:
    from headrace.kernels.torch_executor import TorchExecutor

    model = load_model(Path(load.path), on_progress)
    config = _engine_config("torch", load, model.program, model.info, kv_dtype)
    num_threads = _num_threads(load)
    executor = TorchExecutor(
        model.program,
        model.weights,
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        num_threads=num_threads,
    )
    arithmetic = f"torch {version('torch')} threads={num_threads}"
    return Built(Engine(executor, config), executor.name, num_threads, config.max_sequence_len, arithmetic)


def _num_threads(load: frames.Load) -> int:
    return load.num_threads or hardware.choose_threads(hardware.detect_machine()).count


def _engine_config(
    backend: str, load: frames.Load, program: StepProgram, info: ModelInfo, kv_dtype: backends.KvDtype
) -> EngineConfig:
    block_size = load.block_size or _CPU_BLOCK_SIZE
    block_bytes = backends.kv_block_bytes(program, block_size, kv_dtype)
    fitting = max(2, (load.kv_cache_bytes or _DEFAULT_KV_BYTES) // block_bytes)
    return engine_config(
        backend, load, info, block_size=block_size, num_blocks=wanted_blocks(load, block_size) or fitting
    )


def wanted_blocks(load: frames.Load, block_size: int) -> int:
    """KV blocks that were asked for by number or by tokens; 0: neither."""
    return load.num_blocks or -(-load.kv_cache_tokens // block_size)


def engine_config(
    backend: str, load: frames.Load, info: ModelInfo, *, block_size: int, num_blocks: int
) -> EngineConfig:
    """The engine's limits as the front end asks for them and the model allows."""
    context = info.context_length
    return EngineConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_batched_tokens=backends.token_budget(backend, load.max_num_batched_tokens, load.max_num_seqs),
        max_num_seqs=load.max_num_seqs,
        max_logit_rows=max(_MIN_LOGIT_ROWS, load.max_num_seqs),
        max_model_len=min(load.max_model_len or context, context),
        enable_prefix_cache=load.enable_prefix_cache,
        # The front end is the one that refuses; the engine must be able to take what the front end admitted.
        max_waiting_seqs=load.max_live_sequences,
        max_waiting_tokens=max(load.max_live_tokens, context),
        vocab_size=info.vocab_size,
    )
