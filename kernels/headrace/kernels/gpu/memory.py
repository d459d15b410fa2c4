"""How much GPU memory goes where: weights, activations, KV blocks; and what to say where a model does not fit.

Pure arithmetic, called by `executor.py` and the server when a model is loaded; `headrace.kernels.gpu.device` asks the
driver. All sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from headrace.kernels.gpu.ops import WeightForm
from headrace.kernels.program import KvLayout, StepProgram

ComputeDtype = Literal["fp16", "bf16", "fp32"]
GpuKvDtype = Literal["fp16", "bf16", "fp32", "fp8", "int8"]

ITEM_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8": 1, "int8": 1}
GIB = 1 << 30

# What the driver's own context, the code of a hundred kernels and the captured graphs take beyond what we allocate;
# generous, as running out in the middle of a step ends the engine.
RESERVE_BYTES = 768 << 20


class GpuMemoryError(ValueError):
    """The model does not fit; the message says how much is missing and what would help."""


@dataclass(frozen=True)
class Alternative:
    """Another way to keep the matrices, by the name of a common GGUF type, and its bytes per weight."""

    name: str
    bytes_per_weight: float


# 16-bit weights; int8 in groups of 32 with a 16-bit scale; int4 in groups of 32 with scale and zero, with scale alone.
ALTERNATIVES = (
    Alternative("BF16", 2.0),
    Alternative("Q8_0", 1.0625),
    Alternative("Q4_1", 0.625),
    Alternative("Q4_0", 0.5625),
)


def kv_block_bytes(layouts: Iterable[KvLayout], block_size: int, dtype: GpuKvDtype) -> int:
    """Bytes of one KV block, all layers together, K and V."""
    per_token = sum(2 * layer.num_kv_heads * layer.head_dim for layer in layouts)
    return per_token * block_size * ITEM_BYTES[dtype]


def weight_bytes(program: StepProgram, forms: Mapping[str, WeightForm], compute: ComputeDtype) -> int:
    """Bytes of the packed weights: scales and zeros in the compute dtype, norms and biases in float32. What is
    quantised at load has a byte a weight and a float32 scale a row, or fewer."""
    total = 0
    for spec in program.weights:
        count = math.prod(spec.shape)
        form = forms.get(spec.name)
        if form is None:
            total += 4 * count
        elif form.kind == "dense":
            total += ITEM_BYTES[compute] * count
        elif form.group_size == 0:
            total += count + 4 * spec.shape[0]
        else:
            groups = count // form.group_size * (2 if form.has_zeros else 1)
            total += (count // 2 if form.kind == "int4" else count) + groups * ITEM_BYTES[compute]
    return total


def matrix_elements(program: StepProgram) -> int:
    """Weights that a quantisation would make smaller."""
    return sum(math.prod(spec.shape) for spec in program.weights if len(spec.shape) == 2)


def check_weights_fit(
    free: int, program: StepProgram, forms: Mapping[str, WeightForm], compute: ComputeDtype, other: int, gpu: str
) -> None:
    """Raise GpuMemoryError, before anything is loaded, where weights and `other` (activations, the least KV) exceed
    `free`."""
    weights = weight_bytes(program, forms, compute)
    need = weights + other + RESERVE_BYTES
    if need <= free:
        return
    smaller = [a for a in ALTERNATIVES if matrix_elements(program) * a.bytes_per_weight < 0.95 * weights]
    fitting = [a for a in smaller if matrix_elements(program) * a.bytes_per_weight + other + RESERVE_BYTES <= free]
    if fitting:
        best = fitting[0]
        size = matrix_elements(program) * best.bytes_per_weight
        advice = f"the same model as {best.name} would fit (weights of {_gib(size)})"
    else:
        advice = "no quantisation of this model would fit this GPU"
    raise GpuMemoryError(
        f"{gpu} has {_gib(free)} of memory free and this model needs {_gib(need)} (weights {_gib(weights)}, the rest "
        f"for activations and the least KV cache): {_gib(need - free)} are missing; {advice}"
    )


def num_kv_blocks(
    *, free: int, total: int, fraction: float, block_bytes: int, least_blocks: int, kv_dtype: GpuKvDtype, gpu: str
) -> int:
    """How many KV blocks fit besides the null block, once weights and activations are in place.

    fraction: of `total` that the server may use. least_blocks: for one sequence of 16 tokens, say. Raises
    GpuMemoryError below that.
    """
    usable = free - int(total * (1.0 - fraction)) - RESERVE_BYTES
    count = usable // block_bytes - 1
    if count >= least_blocks:
        return count
    missing = (least_blocks + 1) * block_bytes - usable
    smaller = (
        "" if ITEM_BYTES[kv_dtype] == 1 else "--kv-dtype fp8 halves the cache, a smaller --max-model-len asks less"
    )
    advice = smaller or "a smaller --max-model-len asks less, a quantised model leaves more"
    raise GpuMemoryError(
        f"{gpu} has {_gib(max(usable, 0))} left for the KV cache after the weights; the least is "
        f"{_gib((least_blocks + 1) * block_bytes)}: {_gib(missing)} are missing; {advice}"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
