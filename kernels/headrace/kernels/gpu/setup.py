"""What the executor looks up once, when it is made: the device, workspaces, tuned block sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import torch
from headrace.kernels.gpu import attention, device, memory, tuning
from headrace.kernels.gpu.ops import Attention, GpuProgram, Product, TypedBuffer
from headrace.kernels.gpu.shape import StepLimits
from headrace.kernels.gpu.weights import DeviceWeights
from headrace.kernels.linear import triton as linear
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.pack import PackedLinear
from headrace.kernels.paged_attention import AttentionConfig, default_config
from headrace.kernels.paged_attention.triton import workspace_bytes

if TYPE_CHECKING:
    from headrace.kernels.gpu.executor import GpuOptions

# In the interpreter a program costs milliseconds whatever its size: few large ones. No bit depends on it.
_INTERPRETED_LINEAR = {"block_n": 64, "split_programs": 0}
# Partial results of split KV: enough for a full batch of long contexts; more sequences take several calls.
_MAX_ATTENTION_WORKSPACE = 256 << 20


@dataclass(frozen=True)
class Target:
    """Where kernels run. arch: "sm_90", "interpreter" or "meta". capability None: not on a GPU."""

    device: torch.device
    name: str
    arch: str
    capability: tuple[int, int] | None


@dataclass(frozen=True, eq=False)
class Launching:
    """How ops are launched here. linear_config: of a matrix (by name) for so many rows. linear_workspace,
    attention_workspace: uint8, for partial sums; the first begins with counters that are zero between launches."""

    attention: attention.AttentionChoice
    attention_config: AttentionConfig
    attention_workspace: torch.Tensor
    linear_config: Callable[[str, int], LinearConfig]
    linear_workspace: torch.Tensor


def find_target(name: str) -> Target:
    """name: "cuda", "cpu" (Triton's interpreter) or "meta". Raises GpuUnavailableError."""
    if name == "meta":
        return Target(torch.device("meta"), "no device", "meta", None)
    if name == "cpu":
        if not device.interprets():
            raise device.GpuUnavailableError(f"without a GPU the kernels need {device.INTERPRET_VARIABLE}=1")
        return Target(torch.device("cpu"), "the interpreter", "interpreter", None)
    found = device.probe()
    if found.gpu is None:
        raise device.GpuUnavailableError(found.why)
    problem = device.driver_mismatch(found.gpu.driver, torch.version.cuda)
    if problem:
        raise device.GpuUnavailableError(problem)
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise device.GpuUnavailableError(f"torch cannot use the GPU: {error}") from None
    index = torch.cuda.current_device()
    return Target(torch.device("cuda", index), found.gpu.name, found.gpu.arch, found.gpu.capability)


def launching(
    program: GpuProgram, weights: DeviceWeights, limits: StepLimits, options: GpuOptions, target: Target
) -> Launching:
    """Choose attention and its config, size the workspaces. Raises ValueError where no kernel takes the model."""
    ops = [op for op in program.ops if isinstance(op, Attention)]
    use = attention.use_of(
        ops,
        block_size=limits.block_size,
        compute_dtype=options.compute_dtype,
        kv_dtype=options.kv_dtype,
        arch=target.arch,
        is_interpreted=target.capability is None,
    )
    choice = attention.choose(use, options.attention)
    config = attention_config(ops, limits.block_size, options, target)
    linear_config = _LinearConfigs(weights.matrices, target)
    need = max(_attention_need(op, config, limits.max_seqs, 1, limits.max_model_len) for op in ops)
    least = max(_attention_need(op, config, 1, limits.max_tokens, limits.max_model_len) for op in ops)
    size = max(least, min(need, _MAX_ATTENTION_WORKSPACE))
    return Launching(
        choice,
        config,
        torch.zeros(size, dtype=torch.uint8, device=target.device),
        linear_config,
        torch.zeros(_linear_need(program, weights, limits, linear_config), dtype=torch.uint8, device=target.device),
    )


def attention_config(ops: Sequence[Attention], block_size: int, options: GpuOptions, target: Target) -> AttentionConfig:
    """The tuned config of the model's attention, or the default; its tile is at most a block."""
    op = ops[0]
    shape: dict[str, int | str] = {
        "head_dim": op.head_dim,
        "group": op.num_heads // op.num_kv_heads,
        "kv_dtype": options.kv_dtype,
        "block_size": block_size,
    }
    found = tuning.lookup("paged_attention", target.name, target.arch, m=1, **shape)
    default = default_config(
        head_dim=op.head_dim,
        compute_bytes=memory.ITEM_BYTES[options.compute_dtype],
        kv_bytes=memory.ITEM_BYTES[options.kv_dtype],
        block_size=block_size,
        has_window_or_cap=any(op.window or op.soft_cap for op in ops),
        arch=target.arch,
    )
    return replace(default, **found)


def attention_bytes(program: GpuProgram, launch: Launching, num_seqs: int, max_query_len: int, max_seq_len: int) -> int:
    """Workspace that one call of attention needs, the most of all layers."""
    kinds = {(op.num_heads, op.num_kv_heads, op.head_dim): op for op in program.ops if isinstance(op, Attention)}
    sizes = (num_seqs, max_query_len, max_seq_len)
    return max(_attention_need(op, launch.attention_config, *sizes) for op in kinds.values())


def _attention_need(op: Attention, config: AttentionConfig, num_seqs: int, max_query_len: int, max_seq_len: int) -> int:
    return workspace_bytes(
        num_seqs=num_seqs,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        num_heads=op.num_heads,
        group=op.num_heads // op.num_kv_heads,
        head_dim=op.head_dim,
        config=config,
    )


class _LinearConfigs:
    """Tuned block sizes of the products, looked up once per matrix shape and number of rows."""

    def __init__(self, matrices: object, target: Target) -> None:
        self._matrices = matrices
        self._target = target
        self._known: dict[tuple[object, ...], LinearConfig] = {}

    def __call__(self, name: str, m: int) -> LinearConfig:
        return self.of(self._matrices[name], m)  # type: ignore[index]

    def of(self, matrix: PackedLinear, m: int) -> LinearConfig:
        key = (*_shape_of(matrix), m)
        config = self._known.get(key)
        if config is None:
            n, k = matrix.shape
            shape: dict[str, int | str] = {
                "kind": matrix.kind,
                "n": n,
                "k": k,
                "group_size": matrix.group_size,
                "gated": int(matrix.is_gated),
            }
            found = tuning.lookup("linear", self._target.name, self._target.arch, m=m, **shape)
            if self._target.arch == "interpreter":
                found = _INTERPRETED_LINEAR
            config = LinearConfig(**{**asdict(linear.default_for(matrix, m)), **found})
            self._known[key] = config
        return config


def _shape_of(matrix: PackedLinear) -> tuple[object, ...]:
    """What the block sizes of its products depend on."""
    return (matrix.kind, matrix.shape, matrix.group_size, "zeros" in matrix.tensors, matrix.is_gated)


def _linear_need(program: GpuProgram, weights: DeviceWeights, limits: StepLimits, configs: _LinearConfigs) -> int:
    """The most workspace that any product of a step needs."""
    kinds = {_shape_of(matrix): matrix for matrix in weights.matrices.values()}
    quantizing = {op.matrix for op in program.ops if isinstance(op, Product) and op.out_scale}
    scaled = {_shape_of(weights.matrices[name]) for name in quantizing}
    rows = sorted({min(m, limits.max_tokens) for m in (1, *range(16, limits.max_tokens + 16, 16))})
    return max(
        linear.workspace_bytes(matrix, m, configs.of(matrix, m), has_norm=True, has_out_scale=key in scaled)
        for key, matrix in kinds.items()
        for m in rows
    )


def activation_bytes(program: GpuProgram, limits: StepLimits, options: GpuOptions) -> int:
    """About what a model needs on the device besides weights and KV blocks: buffers and workspaces."""
    item = memory.ITEM_BYTES[options.compute_dtype]
    total = _MAX_ATTENTION_WORKSPACE
    for buffer in program.buffers:
        rows = limits.max_tokens if buffer.rows == "tokens" else limits.max_logit_rows
        size = {"int8": 1, "fp8": 1, "fp32": 4}[buffer.kind] if isinstance(buffer, TypedBuffer) else item
        total += rows * buffer.width * (4 if buffer.name == program.logits else size)
    return total
