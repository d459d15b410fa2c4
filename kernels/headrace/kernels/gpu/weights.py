"""Weights on their way to the device: packed one matrix at a time on the host, sent through pinned memory.

Called by `executor.py` when a model is loaded. No more than one matrix in the file's form and one in the packed form
are in host memory at a time; a copy to the device runs while the next matrix is read and packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from headrace.kernels.gpu.ops import GpuProgram, PackSpec, Product, pack_specs
from headrace.kernels.linear import PackedLinear, pack
from headrace.kernels.linear.pack import dense
from headrace.kernels.linear.quantize import pack_as
from headrace.kernels.program import StepProgram
from headrace.kernels.quant import QuantTensor, Weight

_PINNED_BYTES = 32 << 20  # two of them; a copy of one takes 1.3 ms over PCIe 4


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """matrices: by the names of `pack_specs`. vectors: norms, and biases by the joined names of a product's parts;
    float32."""

    matrices: Mapping[str, PackedLinear]
    vectors: Mapping[str, torch.Tensor]

    @property
    def num_bytes(self) -> int:
        vectors = sum(tensor.numel() * tensor.element_size() for tensor in self.vectors.values())
        return vectors + sum(matrix.num_bytes for matrix in self.matrices.values())


def upload(
    program: GpuProgram,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    device: torch.device,
    on_progress: Callable[[float], None] = lambda share: None,
) -> DeviceWeights:
    """Pack and send what a program needs. on_progress is told the share of the matrices done, 0..1.

    weights: each is looked up once per use, so a mapping that reads from a file holds one product's at a time.
    """
    sender = _Sender(device)
    shapes = {spec.name: spec.shape for spec in program.vectors}
    biases = {op.bias for op in program.ops if isinstance(op, Product) and op.bias}
    groups = [(name,) for name in shapes if not any(name in bias for bias in biases)] + sorted(biases)
    vectors = {}
    for group in groups:
        vectors["+".join(group)] = sender.send(torch.cat([_vector(weights[name]) for name in group]))
    specs = pack_specs(program)
    matrices: dict[str, PackedLinear] = {}
    for number, spec in enumerate(specs):
        packed = _pack(spec, weights, dtype)
        matrices[spec.name] = replace(packed, tensors={name: sender.send(t) for name, t in packed.tensors.items()})
        on_progress((number + 1) / len(specs))
    sender.finish()
    return DeviceWeights(matrices, vectors)


def check_shapes(program: StepProgram, weights: Mapping[str, Weight]) -> None:
    """Raise ValueError where a weight is missing or has another shape. For weights that are in memory."""
    for spec in program.weights:
        weight = weights.get(spec.name)
        if weight is None or weight.shape != spec.shape:
            raise ValueError(f"weight {spec.name}: want {spec.shape}, have {None if weight is None else weight.shape}")


def _pack(spec: PackSpec, weights: Mapping[str, Weight], dtype: torch.dtype) -> PackedLinear:
    sources = [weights[source] for source in spec.sources]
    if spec.quantized is None:
        return pack(sources, dtype=dtype, is_gated=spec.is_gated)
    return pack_as(spec.quantized, [dense(source) for source in sources], dtype=dtype, is_gated=spec.is_gated)


def _vector(weight: Weight) -> torch.Tensor:
    assert not isinstance(weight, QuantTensor)
    return torch.from_numpy(np.array(weight, np.float32))


class _Sender:
    """Copies host tensors to the device through two pinned buffers that take turns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._turn = 0
        if device.type == "cuda":
            self._buffers = [torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            self._events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; its bytes may still be on their way."""
        if self._device.type != "cuda":
            return tensor.to(self._device)
        # A dense weight's rows may be padded to 16 bytes: the storage goes over as it lies, the view is made anew.
        size = tensor.untyped_storage().nbytes()
        source_bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        target_bytes = torch.empty(size, dtype=torch.uint8, device=self._device)
        for begin in range(0, source_bytes.numel(), _PINNED_BYTES):
            part = source_bytes[begin : begin + _PINNED_BYTES]
            self._turn ^= 1
            buffer, event = self._buffers[self._turn], self._events[self._turn]
            event.synchronize()  # its last copy; returns at once for an event that was never recorded
            buffer[: part.numel()].copy_(part)
            target_bytes[begin : begin + part.numel()].copy_(buffer[: part.numel()], non_blocking=True)
            event.record()
        typed = target_bytes.view(tensor.dtype)
        return typed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def finish(self) -> None:
        """Wait until everything has arrived; the pinned memory is free afterwards."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
