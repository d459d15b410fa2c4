"""One decode step of a model, recorded launch by launch on tensors without storage: kernels per layer and bytes.

Run by gates.py as `python -m tests.gpu.aot.audit`; document.py takes its floors from here. The step goes through the
executor that serves (`headrace.kernels.gpu`), so what is counted is what a GPU would be given.

Bytes of DRAM: every tensor that a launch is given, once; of the KV blocks what the sequences of the batch have in them,
of an embedding table the rows that are looked up; not what the programs of one op leave for each other, where that
stays in L2. Held against weights + KV + activations as the step program has them.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.gpu.executor import GpuExecutor, GpuOptions
from headrace.kernels.gpu.lower import lower
from headrace.kernels.gpu.memory import ITEM_BYTES
from headrace.kernels.gpu.ops import GpuProgram, PackSpec, TypedBuffer, WeightForm, pack_specs, reads, writes
from headrace.kernels.gpu.quantization import KINDS, quantized_forms
from headrace.kernels.gpu.shape import StepLimits
from headrace.kernels.gpu.weights import DeviceWeights
from headrace.kernels.linear import PackedLinear
from headrace.kernels.program import StepProgram
from headrace.models.config import LayerConfig, ModelConfig
from headrace.models.decoder import build_program
from headrace.models.rope import RopeConfig
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.gpu.aot.capture import Launch, capture
from tests.gpu.aot.models import LLAMA_8B, LLAMA_70B_TP4, QWEN3_32B, SMOLLM2, ModelShape, meta, weight
from tests.gpu.aot.targets import TARGETS, Target

# Kernels of a layer by how often they may be launched; what is not named here is unexpected. A product is one of these:
PRODUCTS = ("packed_kernel", "direct_kernel", "persistent_packed_kernel", "persistent_direct_kernel")
ATTENTION = {"split_kernel": 1, "reduce_kernel": 1}
# Matrices and rows in 8 bits: norms write them, and what attention and the gate leave is quantised by itself.
IN_8_BITS = {"_rms_norm_kernel": 2, "_rows_kernel": 2}
IN_8_BIT_BLOCKS = {"_rms_norm_kernel": 2, "_groups_kernel": 2}
# Zeros and more than 64 rows: sums of x by groups once, instead of in every tile of weights.
GROUP_SUMS = {"group_sums_kernel": 4}
SCRATCH = ("partials", "counters", "partial_ptr", "stats_ptr", "group_sums")
L2_BYTES = 40 << 20  # of an A100; an H100 and a B200 have more
BYTES_TOLERANCE = 0.05
BLOCK_SIZE = 64


@dataclass(frozen=True)
class Load:
    """What is served. kind: of all matrices, as models.weight names it. context: positions of each sequence."""

    model: ModelShape
    kind: str
    num_seqs: int
    context: int

    def __str__(self) -> str:
        return f"{self.model.name} {self.kind}, {self.num_seqs} sequences of {self.context}"


@dataclass(frozen=True)
class Audit:
    """launches: of the whole step, in order. layer: launches of one layer in the middle. weights, kv, activations:
    bytes that the step has to move. moved: bytes that its launches are given. operations: 2 per multiply-add."""

    load: Load
    launches: tuple[Launch, ...]
    layer: tuple[Launch, ...]
    weights: int
    kv: int
    activations: int
    moved: int
    operations: float

    @property
    def needed(self) -> int:
        return self.weights + self.kv + self.activations

    @property
    def expected(self) -> Counter[str]:
        """How often a kernel may be launched in a layer; "product" stands for any of PRODUCTS."""
        kind, seqs = self.load.kind, self.load.num_seqs
        more = {"fp8_block": IN_8_BIT_BLOCKS, "fp8": IN_8_BITS, "w8a8": IN_8_BITS}.get(kind, {})
        if kind.endswith("z") and seqs > 64:
            more = GROUP_SUMS
        return Counter({"product": 4, **ATTENTION, **more})

    def floor(self, target: Target) -> float:
        """Seconds that no implementation on this GPU can go below: by bytes or by operations, whatever is longer."""
        return max(self.needed / target.bandwidth, self.operations / target.tensor_flops)


def audit(load: Load, target: Target = TARGETS["cuda:90"]) -> Audit:
    """Record one decode step."""
    program = build_program(_config(load.model))
    form = _form(load.kind)
    forms = {spec.name: form for spec in program.weights if len(spec.shape) == 2}
    quantization = next((name for name, kind in KINDS.items() if kind == load.kind), "none")
    forms = quantized_forms(program, forms, quantization)
    gpu = lower(program, forms)
    weights = _weights(program, gpu, load.kind)
    limits = _limits(load)
    with capture(target) as launches:
        executor = GpuExecutor(program, weights, limits, GpuOptions(device="meta"), forms=forms)
        executor.allocate_kv(load.num_seqs * limits.table_width)
        executor.submit(_decode_batch(load, limits))
    kv = sum(2 * load.num_seqs * load.context * layer.num_kv_heads * layer.head_dim * 2 for layer in program.kv)
    looked_up = {spec.name for spec in pack_specs(gpu)} - _multiplied(gpu)
    read = sum(matrix.num_bytes for name, matrix in weights.matrices.items() if name not in looked_up)
    vectors = sum(tensor.numel() * tensor.element_size() for tensor in weights.vectors.values())
    work = sum(2.0 * m.shape[0] * m.shape[1] for name, m in weights.matrices.items() if name not in looked_up)
    attention = sum(4.0 * load.context * load.model.heads * layer.head_dim for layer in program.kv)
    return Audit(
        load,
        tuple(launches),
        _middle_layer(launches),
        read + vectors,
        kv,
        _activations(gpu, load),
        sum(_bytes(launch, load) for launch in launches),
        load.num_seqs * (work + attention),
    )


def _config(model: ModelShape) -> ModelConfig:
    layer = LayerConfig(window=0, rope=RopeConfig(500000.0))
    return ModelConfig(
        architecture="qwen3" if model.has_qk_norm else "llama",
        vocab_size=model.vocab,
        context_length=131072,
        hidden_size=model.hidden,
        intermediate_size=model.ffn,
        num_heads=model.heads,
        num_kv_heads=model.kv_heads,
        head_dim=model.head_dim,
        layers=(layer,) * model.layers,
        rms_norm_eps=1e-5,
        activation="silu",
        attention_scale=model.head_dim**-0.5,
        is_tied=False,
        qk_norm=model.has_qk_norm,
    )


def _form(kind: str) -> WeightForm:
    name, _, group = kind.partition("-g")
    if name in ("int4", "int8"):
        return WeightForm(name, int(group.rstrip("z")), group.endswith("z"))  # type: ignore[arg-type]
    return WeightForm("dense")


def _weights(program: StepProgram, gpu: GpuProgram, kind: str) -> DeviceWeights:
    shapes = {spec.name: spec.shape for spec in program.weights}

    def packed(spec: PackSpec) -> PackedLinear:
        rows = sum(shapes[source][0] for source in spec.sources)
        stored = kind if kind not in KINDS.values() else spec.quantized or "dense"
        return weight(stored, rows, shapes[spec.sources[0]][1], is_gated=spec.is_gated)

    vectors = {spec.name: meta(*spec.shape, dtype=torch.float32) for spec in gpu.vectors}
    return DeviceWeights({spec.name: packed(spec) for spec in pack_specs(gpu)}, vectors)


def _limits(load: Load) -> StepLimits:
    return StepLimits(
        max_tokens=2048,
        max_seqs=load.num_seqs,
        max_logit_rows=load.num_seqs,
        max_model_len=load.context,
        block_size=BLOCK_SIZE,
    )


def _decode_batch(load: Load, limits: StepLimits) -> StepBatch:
    seqs = load.num_seqs
    tables = np.arange(seqs * limits.table_width, dtype=np.int32).reshape(seqs, -1)
    last = np.full(seqs, load.context - 1, np.int32)
    return StepBatch(
        token_ids=np.zeros(seqs, np.int32),
        positions=last,
        slot_mapping=tables[:, (load.context - 1) // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE,
        cu_seqlens_q=np.arange(seqs + 1, dtype=np.int32),
        seq_lens=last + 1,
        block_tables=tables,
        logit_rows=np.arange(seqs, dtype=np.int32),
        sampling=(RowSampling(),) * seqs,
    )


def _multiplied(gpu: GpuProgram) -> set[str]:
    return {op.matrix for op in gpu.ops if hasattr(op, "matrix")}


def _activations(gpu: GpuProgram, load: Load) -> int:
    """Every buffer of the step, written and read once by each op that names it: the program's own traffic."""
    sizes = {buffer.name: ITEM_BYTES[buffer.kind] for buffer in gpu.buffers if isinstance(buffer, TypedBuffer)}
    sizes[gpu.logits] = 4
    widths = {buffer.name: buffer.width * sizes.get(buffer.name, 2) for buffer in gpu.buffers}
    widths |= {view.name: view.width * 2 for view in gpu.views}
    return load.num_seqs * sum(widths[name] for op in gpu.ops for name in (*reads(op), *writes(op)))


def _bytes(launch: Launch, load: Load) -> int:
    """Bytes that a launch moves, each tensor once."""
    total, seen = 0, set[int]()
    op = launch.function.fn.__module__.removeprefix("headrace.kernels.").split(".")[0]
    num_blocks = load.num_seqs * _limits(load).table_width
    arguments = launch.arguments()
    scratch = list(_tensors(arguments[name] for name in SCRATCH if name in arguments))
    in_cache = sum(value.numel() * value.element_size() for value in scratch) <= L2_BYTES // 2
    seen |= {id(value) for value in scratch if in_cache}
    for value in _tensors(arguments.values()):
        if id(value) in seen:
            continue
        seen.add(id(value))
        if value.ndim == 4 and value.shape[0] == num_blocks + 1:  # the KV blocks
            rows = load.context if op == "paged_attention" else 1
            total += load.num_seqs * rows * value.shape[1] * value.shape[3] * value.element_size()
        elif op == "embed" and value.numel() > load.model.vocab:
            total += load.num_seqs * value.numel() * value.element_size() // load.model.vocab
        else:
            total += value.numel() * value.element_size()
    return total


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, TensorDescriptor):
            yield value.base
        elif isinstance(value, tuple):
            yield from _tensors(value)


def _middle_layer(launches: Sequence[Launch]) -> tuple[Launch, ...]:
    """From one attention to the next, in the middle of the step."""
    starts = [index for index, launch in enumerate(launches) if launch.kernel == "split_kernel"]
    middle = len(starts) // 2
    return tuple(launches[starts[middle] : starts[middle + 1]])


LOADS = tuple(
    Load(model, kind, seqs, 4096)
    for model, kind in (
        (SMOLLM2, "int4-g32z"),
        (LLAMA_8B, "int4-g32z"),
        (LLAMA_8B, "int4-g128"),
        (LLAMA_8B, "dense"),
        (LLAMA_8B, "w8a8"),
        (LLAMA_8B, "fp8_block"),
        (QWEN3_32B, "int4-g128"),
        (LLAMA_70B_TP4, "int4-g128"),
    )
    for seqs in (1, 16, 64, 256)
)


def problems(result: Audit) -> list[str]:
    """What does not hold of one step."""
    found = []
    launched = Counter("product" if each.kernel in PRODUCTS else each.kernel for each in result.layer)
    expected = result.expected
    unexpected, missing = launched - expected, expected - launched
    if unexpected:
        found.append(
            f"{result.load}: {len(result.layer)} launches a layer, at most {expected.total()} are expected; "
            f"unexpected: {_names(unexpected)}; not launched: {_names(missing)}"
        )
    excess = result.moved / result.needed - 1
    if abs(excess) > BYTES_TOLERANCE:
        found.append(f"{result.load}: launches move {excess:+.1%} of weights + KV + activations")
    return found


def _names(kernels: Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in sorted(kernels.items())) or "none"


def main() -> int:
    failed = 0
    for load in LOADS:
        result = audit(load)
        found = problems(result)
        failed += len(found)
        sizes = (("moved", result.moved), ("weights", result.weights), ("KV", result.kv))
        sizes += (("activations", result.activations),)
        print(
            f"{load}: {len(result.launches)} launches, {len(result.layer)} a layer "
            f"({', '.join(launch.kernel for launch in result.layer)}); "
            f"{', '.join(f'{name} {size / 1e9:.3f} GB' for name, size in sizes)}"
        )
        print("\n".join(found), end="\n" if found else "")
    print(f"{2 * len(LOADS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
