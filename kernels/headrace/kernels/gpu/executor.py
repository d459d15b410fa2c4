"""The triton back end: runs a step program with Triton kernels on a GPU, or in Triton's interpreter on a CPU.

Made by the engine process (`headrace.server.gpu_build`), in this order: the constructor lowers the program and streams
the weights; `num_kv_blocks` says what is left; `allocate_kv` and, for preempted sequences, `allocate_host`; `warm_up`
compiles and captures. Then `execute`, or
`submit` and `collect`: one copy to the device, the step's kernels, one copy back, and no wait in between, so that the
engine can schedule the next step while this one runs.

device="meta": nothing is computed; the launch audit of tests/gpu records what would be launched.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from headrace.kernels.batch import F32, ExecutorLostError, RowResult, RowSampling, StepBatch
from headrace.kernels.gpu import attention, cache, memory, setup, warm
from headrace.kernels.gpu.graphs import DecodeGraphs
from headrace.kernels.gpu.lower import LowerOptions, lower
from headrace.kernels.gpu.ops import WeightForm, form_of
from headrace.kernels.gpu.sampling import Sampler
from headrace.kernels.gpu.shape import StepLimits, StepShape, decode_shape, ladder, shape_of
from headrace.kernels.gpu.staging import Staging
from headrace.kernels.gpu.step import StepRunner
from headrace.kernels.gpu.swap import HostBlocks, min_swap_tokens, num_host_blocks, seconds
from headrace.kernels.gpu.weights import DeviceWeights, upload
from headrace.kernels.program import StepProgram
from headrace.kernels.quant import Weight

log = logging.getLogger("headrace.kernels")

MAX_IN_FLIGHT = 2  # steps submitted and not collected: one that runs, one that waits behind it


@dataclass(frozen=True)
class GpuOptions:
    """How to compute. compute_dtype: of activations, products and dense weights. kv_dtype: the same, or 8 bits.
    device: "cuda", "cpu" (Triton's interpreter) or "meta". has_graphs: capture decode steps (on a GPU)."""

    compute_dtype: memory.ComputeDtype = "bf16"
    kv_dtype: memory.GpuKvDtype = "bf16"
    device: str = "cuda"
    attention: attention.AttentionName = "auto"
    has_graphs: bool = True
    lowering: LowerOptions = field(default_factory=LowerOptions)


@dataclass(frozen=True, eq=False)
class _InFlight:
    """A step that was submitted. slot: of the pinned buffer that its results go to."""

    slot: int
    sampling: tuple[RowSampling, ...]
    done: torch.cuda.Event | None


class GpuExecutor:
    """Implements PipelinedExecutor and SwappingExecutor of `headrace.kernels.batch`.

    weights: one per `program.weights`, each looked up when it is its turn. forms: of the matrices, where they are known
    without loading them. on_progress: share of the weights on the device, 0..1. Raises ValueError for a model that the
    kernels cannot take, GpuMemoryError, GpuUnavailableError.
    """

    def __init__(
        self,
        program: StepProgram,
        weights: Mapping[str, Weight] | DeviceWeights,
        limits: StepLimits,
        options: GpuOptions,
        *,
        forms: Mapping[str, WeightForm] | None = None,
        on_progress: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._limits = limits
        self._options = options
        self._target = setup.find_target(options.device)
        self._device = self._target.device
        if forms is None:
            assert isinstance(weights, Mapping)
            forms = {spec.name: form_of(weights[spec.name]) for spec in program.weights if len(spec.shape) == 2}
        self._program = lower(program, forms, options.lowering)
        self._check_model(program, forms)
        dtype = cache.COMPUTE[options.compute_dtype]
        if not isinstance(weights, DeviceWeights):
            weights = upload(self._program, weights, dtype, self._device, on_progress)
        self._weights = weights
        self._sampler = Sampler(program.vocab_size, limits.max_logit_rows, self._device)
        self._staging = Staging(limits, self._device, self._sampler.num_words)
        self._sampler.attach(self._staging.batch.extra)
        self._launching = setup.launching(self._program, weights, limits, options, self._target)
        self._runner = StepRunner(
            self._program, weights, limits, dtype, self._staging.batch, self._launching, self._sampler.sampled
        )
        self._num_blocks = 0
        self._graphs = DecodeGraphs()
        self._host: HostBlocks | None = None
        self.min_swap_tokens = 1  # from how many tokens on swapping is worth it; measured in `warm_up`
        self._in_flight: deque[_InFlight] = deque()

    # --- before the first step

    @property
    def name(self) -> str:
        return f"triton-{self._target.arch}"

    @property
    def limits(self) -> StepLimits:
        return self._limits

    @property
    def kv_block_bytes(self) -> int:
        """Of one block, all layers."""
        return memory.kv_block_bytes(self._program.kv, self._limits.block_size, self._options.kv_dtype)

    def num_kv_blocks(self, fraction: float, least_blocks: int) -> int:
        """How many blocks fit into what is left of `fraction` of the device's memory, found by running the largest step
        once. Raises GpuMemoryError below `least_blocks`. Without a GPU: no limit."""
        if self._device.type != "cuda":
            return 1 << 20
        self.allocate_kv(2)
        self._run_largest()
        torch.cuda.synchronize(self._device)
        self._runner.caches = []
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return memory.num_kv_blocks(
            free=free,
            total=total,
            fraction=fraction,
            block_bytes=self.kv_block_bytes,
            least_blocks=least_blocks,
            kv_dtype=self._options.kv_dtype,
            gpu=self._target.name,
        )

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV blocks, and the null block behind them; what an earlier call made is gone."""
        self._runner.caches = []
        self._num_blocks = num_blocks
        dtype = cache.storage_dtype(self._options.kv_dtype, self._target.capability)
        layouts, size = self._program.kv, self._limits.block_size
        scales = self._calibrate() if dtype.itemsize == 1 else None
        self._runner.caches = cache.allocate(layouts, num_blocks, size, dtype, self._device, scales)

    def allocate_host(self, num_bytes: int) -> int:
        """Make blocks of host memory for the KV of preempted sequences; how many there are. Call after `allocate_kv`.

        0, with a warning, where they cannot be had: such sequences are then computed again.
        """
        count = num_host_blocks(num_bytes, self.kv_block_bytes)
        try:
            self._host = HostBlocks(self._runner.caches, count) if count else None
        except (ValueError, RuntimeError) as error:
            log.warning("no swap space, preempted sequences are computed again: %s", error)
            self._host = None
        return 0 if self._host is None else self._host.num_blocks

    def warm_up(self, on_progress: Callable[[float], None] = lambda share: None) -> None:
        """Compile the kernels of prefill and sampling, which a request would else wait for, and capture the decode
        steps, largest first, so that they share memory. Without a GPU there is nothing to do: the interpreter compiles
        nothing."""
        if self._device.type != "cuda":
            on_progress(1.0)
            return
        batches = warm.warm_up_batches(self._limits, self._num_blocks)
        for done, batch in enumerate(batches):
            on_progress(0.5 * done / len(batches))
            self.execute(batch)
        if self._options.has_graphs:
            self.capture_decode(lambda share: on_progress(0.5 + 0.5 * share))
        if self._host is not None:
            self.min_swap_tokens = self._measure_swapping(self._host)
        torch.cuda.synchronize(self._device)
        on_progress(1.0)

    def capture_decode(self, on_progress: Callable[[float], None] = lambda share: None) -> None:
        """Capture the decode step of every size of the ladder; part of `warm_up`."""
        sizes = ladder(self._limits.max_seqs)
        for done, size in enumerate(reversed(sizes)):
            on_progress(done / len(sizes))
            self._fill(warm.decode_batch(self._num_blocks, self._limits.block_size), size)
            self._graphs.capture(size, partial(self._runner.run, self._captured_shape(size)))

    def _measure_swapping(self, host: HostBlocks) -> int:
        prefill = warm.prefill_batch(self._limits, self._num_blocks)
        decode = warm.decode_batch(self._num_blocks, self._limits.block_size)
        per_token = seconds(partial(self._run, prefill), self._device) / len(prefill.token_ids)
        costs = host.costs(per_token, seconds(partial(self._run, decode), self._device))
        tokens = min_swap_tokens(costs, self._limits.block_size)
        log.info("preempted sequences of %d tokens or more are swapped to the host: %s", tokens, costs)
        return tokens

    def _captured_shape(self, size: int) -> StepShape:
        return decode_shape(size, self._limits.max_model_len, self._fits)

    def summary(self) -> str:
        """One line for the log: where the memory went, what computes attention, how many graphs there are."""
        blocks = self._num_blocks * self.kv_block_bytes
        sizes = (("weights", self._weights.num_bytes), ("activations", self._runner.num_bytes), ("KV", blocks))
        used = ", ".join(f"{what} {size / memory.GIB:.2f} GiB" for what, size in sizes)
        choice = self._launching.attention
        if self._host is not None:
            used += f", swap space {self._host.num_bytes / memory.GIB:.2f} GiB of the host's"
        return f"{used}; attention by {choice.name} ({choice.why}); {len(self._graphs)} decode graphs"

    # --- steps

    def execute(self, batch: StepBatch) -> list[RowResult]:
        """Run one step; one result per row of batch.logit_rows. Raises ValueError where the batch does not fit; nothing
        has run then."""
        self.submit(batch)
        return self.collect()

    @property
    def has_room(self) -> bool:
        """Whether another step may be submitted before one is collected."""
        return len(self._in_flight) < MAX_IN_FLIGHT

    def submit(self, batch: StepBatch) -> None:
        """Queue one step and return at once; the batch's arrays are the caller's again. A token id of -1 - i stands for
        the token of result i of the step submitted before, wherever that is by now."""
        if not self.has_room:
            raise RuntimeError(f"{len(self._in_flight)} steps are in flight already")
        self._limits.check(batch)
        with _lost_device():
            slot = self._launch(batch, batch.sampling)
            done = None
            if self._device.type == "cuda":
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
        self._in_flight.append(_InFlight(slot, batch.sampling, done))

    def collect(self) -> list[RowResult]:
        """The results of the step that was submitted first; waits for it."""
        step = self._in_flight.popleft()
        if step.done is not None:
            with _lost_device():
                step.done.synchronize()
        return self._sampler.decode(step.slot, step.sampling)

    def swap_out(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """Copy KV blocks to host blocks, behind the steps submitted so far and ahead of later ones."""
        assert self._host is not None, "there are no host blocks"
        with _lost_device():
            self._host.swap_out(blocks, host_blocks)

    def swap_in(self, blocks: Sequence[int], host_blocks: Sequence[int]) -> None:
        """The inverse of `swap_out`."""
        assert self._host is not None, "there are no host blocks"
        with _lost_device():
            self._host.swap_in(blocks, host_blocks)

    def forward(self, batch: StepBatch) -> F32:
        """Run the step program alone: the logits, float32 [S, vocab_size], and the batch's keys and values written."""
        self._limits.check(batch)
        shape = self._run(batch)
        logits: F32 = self._runner.logits(shape)[: len(batch.logit_rows)].cpu().numpy().copy()
        return logits

    def replay(self, num_seqs: int) -> None:
        """Queue the captured decode step for so many sequences on what the device holds: its time is the kernels'."""
        size = self._graphs.size_for(num_seqs)
        assert size is not None, "no graph was captured"
        self._graphs.replay(size)

    def poison(self, block: int) -> None:
        """Fill a KV block with NaN (8-bit ones with their largest), so that a test sees who reads what was freed."""
        for layer in self._runner.caches:
            for tensor in (layer.k, layer.v):
                if tensor.dtype.itemsize == 1:
                    tensor.view(torch.uint8)[block] = 0x7F
                else:
                    tensor[block] = float("nan")

    def _launch(self, batch: StepBatch, sampling: tuple[RowSampling, ...]) -> int:
        """Queue a step and the copy of its results; the slot that these go to."""
        shape = self._run(batch, sampling)
        if sampling:
            self._sampler.launch(self._runner.logits(shape)[: len(sampling)], self._staging.slot)
        return self._staging.slot

    def _run(self, batch: StepBatch, sampling: tuple[RowSampling, ...] = ()) -> StepShape:
        shape = shape_of(batch, self._fits)
        is_decode = shape.selects_all and shape.num_seqs == shape.num_tokens
        size = self._graphs.size_for(shape.num_seqs) if is_decode else None
        self._fill(batch, size or shape.num_seqs, sampling)
        if size is None:
            self._runner.run(shape)
            return shape
        self._graphs.replay(size)
        return self._captured_shape(size)

    def _fill(self, batch: StepBatch, num_seqs: int, sampling: tuple[RowSampling, ...] = ()) -> None:
        self._staging.fill(batch, num_seqs=num_seqs, null_block=self._num_blocks)
        if sampling:
            newest = batch.token_ids[batch.logit_rows]
            self._sampler.encode(sampling, np.where(newest < 0, -1 - newest, -1).tolist(), self._staging.extra())
        self._staging.send(num_seqs)

    def _fits(self, num_seqs: int, max_query_len: int, max_seq_len: int) -> bool:
        return (
            setup.attention_bytes(self._program, self._launching, num_seqs, max_query_len, max_seq_len)
            <= self._launching.attention_workspace.numel()
        )

    def _run_largest(self) -> None:
        """The largest prefill step, on the null block and block 0: compiles what a prefill needs."""
        self._run(warm.prefill_batch(self._limits, self._num_blocks))
        self._run(warm.decode_batch(self._num_blocks, self._limits.block_size))

    def _calibrate(self) -> list[cache.KvScales]:
        """Scales for 8-bit keys and values: the largest of each head over a fixed random text, with a margin; larger
        values saturate. The text runs through blocks of the compute dtype."""
        dtype = cache.COMPUTE[self._options.compute_dtype]
        batch = warm.calibration_batch(self._limits, self._program.vocab_size, is_short=self._device.type != "cuda")
        num_blocks, self._num_blocks = self._num_blocks, batch.block_tables.shape[1]
        self._runner.caches = cache.allocate(
            self._program.kv, self._num_blocks, self._limits.block_size, dtype, self._device
        )
        self._run(batch)
        scales = [cache.scales_of(layer, self._options.kv_dtype) for layer in self._runner.caches]
        self._runner.caches = []
        self._num_blocks = num_blocks
        return scales

    def _check_model(self, program: StepProgram, forms: Mapping[str, WeightForm]) -> None:
        if self._device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(self._device)
        other = setup.activation_bytes(self._program, self._limits, self._options)
        memory.check_weights_fit(free, program, forms, self._options.compute_dtype, other, self._target.name)


@contextmanager
def _lost_device() -> Iterator[None]:
    """A CUDA error stays with the context: whatever is asked of it next fails too. Running out of memory does not."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, torch.AcceleratorError) or "CUDA" in str(error):
            raise ExecutorLostError(f"the GPU failed: {error}") from error
        raise
