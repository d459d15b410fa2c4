"""What bench/gpu.py and bench/tune.py share: shapes of real models, operands on the device, and a timer.

Times are of CUDA graphs of many launches, each on operands of its own as far as memory allows, so that neither the
launching CPU nor the L2 cache flatters a kernel. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COLD_BYTES = 512 << 20  # operands that take turns: several times the largest L2 cache
MAX_COPIES = 32
ROUNDS = 7


@dataclass(frozen=True)
class Model:
    """One GPU's share of a model."""

    name: str
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def products(self) -> tuple[tuple[str, int, int, bool], ...]:
        """(name, rows of the weight, columns, whether it is gated) of every product of a layer, and the head."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return (
            ("qkv", qkv, self.hidden, False),
            ("output", self.hidden, self.heads * self.head_dim, False),
            ("gate-up", 2 * self.ffn, self.hidden, True),
            ("down", self.hidden, self.ffn, False),
            ("head", self.vocab, self.hidden, False),
        )


MODELS = {
    model.name: model
    for model in (
        Model("smollm2-135m", 576, 1536, 9, 3, 64, 49152),
        Model("llama-3-8b", 4096, 14336, 32, 8, 128, 128256),
        Model("qwen3-32b", 5120, 25600, 64, 8, 128, 151936),
    )
}


def gpu_line() -> dict[str, Any]:
    """What is named beside every number: the GPU, its driver's CUDA version, torch and triton. {} without a GPU."""
    if not torch.cuda.is_available():
        return {}
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "arch": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "sms": properties.multi_processor_count,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def copies_of(num_bytes: int) -> int:
    """How many copies of an operand take turns."""
    return max(1, min(MAX_COPIES, COLD_BYTES // max(1, num_bytes)))


def microseconds(runs: Sequence[Callable[[], None]], launches: int = 64) -> float:
    """Median time of one run, of ROUNDS replays of a graph of `launches` runs, taken in turn."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            runs[index % len(runs)]()
    graph.replay()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s read plus written by a copy that fits no cache: what floors are computed from."""
    source = torch.empty(COLD_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COLD_BYTES / microseconds([lambda: target.copy_(source)], 8) / 1e3


def random_packed(kind: str, n: int, k: int, *, is_gated: bool, device: str = "cuda") -> Any:
    """A packed matrix of random bits: "int4" or "int8" in groups of 32 with zeros, or "dense" in bf16."""
    from headrace.kernels.linear.layout import TILE, block_layout
    from headrace.kernels.linear.pack import SCALE_WORDS, PackedLinear, make_rowwise

    rows = (n // 2, n // 2) if is_gated else (n,)
    if kind == "dense":
        weight = torch.randn(n, k, device=device, dtype=torch.bfloat16) * 0.02
        return make_rowwise("dense", weight, None, rows, torch.bfloat16, is_gated)
    layout = block_layout(kind, 32)
    tiles, blocks = -(-n // TILE), -(-k // layout.block_k)
    words = torch.randint(-(1 << 15), 1 << 15, (tiles, blocks, TILE, layout.words), dtype=torch.int16, device=device)

    def factors() -> torch.Tensor:
        values = torch.rand(tiles, blocks, TILE, layout.groups, device=device, dtype=torch.float16) * 0.01
        return values.view(SCALE_WORDS[layout.groups]).squeeze(-1)

    tensors = {"words": words, "scales": factors(), "zeros": factors()}
    return PackedLinear(kind, (n, k), rows, 32, is_gated, torch.bfloat16, tensors)  # type: ignore[arg-type]


Runs = list[Callable[[], None]]


def product_runs(kind: str, n: int, k: int, m: int, *, is_gated: bool) -> Callable[[Any], Runs]:
    """From a LinearConfig to launches of one product of m rows, each on a weight of its own."""
    from headrace.kernels.linear.triton import linear, workspace_bytes

    first = random_packed(kind, n, k, is_gated=is_gated)
    weights = [first] + [random_packed(kind, n, k, is_gated=is_gated) for _ in range(copies_of(first.num_bytes) - 1)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(m, first.out_features, device="cuda", dtype=torch.bfloat16)
    activation = "silu" if is_gated else None

    def runs(config: Any) -> Runs:
        workspace = torch.zeros(workspace_bytes(first, m, config), dtype=torch.uint8, device="cuda")

        def run(weight: Any) -> Callable[[], None]:
            return lambda: linear(x, weight, out, activation=activation, workspace=workspace, config=config)

        return [run(weight) for weight in weights]

    return runs


@dataclass(frozen=True)
class AttentionCase:
    """num_seqs sequences of `context` positions with query_len rows each."""

    model: Model
    num_seqs: int
    context: int
    query_len: int = 1
    kv: str = "bf16"

    @property
    def kv_bytes(self) -> int:
        """Keys and values that must be read at least once."""
        item = 1 if self.kv == "fp8" else 2
        return 2 * self.num_seqs * self.context * self.model.kv_heads * self.model.head_dim * item

    @property
    def flops(self) -> float:
        """Of a causal prefill; of decode too little to matter."""
        rows = self.query_len * (self.context - self.query_len / 2)
        return 4.0 * self.num_seqs * rows * self.model.heads * self.model.head_dim


def attention_runs(case: AttentionCase, block_size: int = 64) -> Callable[[Any], Runs]:
    """From an AttentionConfig to launches of paged attention over permuted blocks, each over a cache of its own."""
    from headrace.kernels.gpu.cache import storage_dtype
    from headrace.kernels.paged_attention.triton import paged_attention, workspace_bytes

    model = case.model
    blocks = -(-case.context // block_size)
    capability = torch.cuda.get_device_capability()
    dtype = storage_dtype(case.kv, capability)
    compute = torch.float16 if case.kv == "fp8" else torch.bfloat16
    shape = (case.num_seqs * blocks + 1, model.kv_heads, block_size, model.head_dim)
    tables = torch.randperm(case.num_seqs * blocks, device="cuda").to(torch.int32).view(case.num_seqs, blocks)
    rows = case.num_seqs * case.query_len
    q = torch.randn(rows, model.heads, model.head_dim, device="cuda", dtype=compute)
    out = torch.empty_like(q)
    cu_seqlens = torch.arange(0, rows + 1, case.query_len, device="cuda", dtype=torch.int32)
    seq_lens = torch.full((case.num_seqs,), case.context, device="cuda", dtype=torch.int32)
    sizes = {"num_seqs": case.num_seqs, "max_query_len": case.query_len, "max_seq_len": case.context}
    group = model.heads // model.kv_heads
    scale = torch.ones(model.kv_heads, device="cuda") if dtype.itemsize == 1 else None

    def cache() -> torch.Tensor:
        values = torch.randn(shape, device="cuda", dtype=torch.float16).to(compute)
        return values if dtype.itemsize > 1 else values.to(torch.float8_e4m3fn).view(torch.uint8).view(dtype)

    caches = [(cache(), cache()) for _ in range(min(4, copies_of(case.kv_bytes)))]

    def runs(config: Any) -> Runs:
        need = workspace_bytes(num_heads=model.heads, group=group, head_dim=model.head_dim, config=config, **sizes)
        workspace = torch.empty(max(16, need), dtype=torch.uint8, device="cuda")
        shared = {
            "cu_seqlens_q": cu_seqlens,
            "seq_lens": seq_lens,
            "block_tables": tables,
            "scale": model.head_dim**-0.5,
            "k_scale": scale,
            "v_scale": scale,
            "workspace": workspace,
            "config": config,
        }

        def run(k: torch.Tensor, v: torch.Tensor) -> Callable[[], None]:
            return lambda: paged_attention(q, k, v, out, **shared, **sizes)

        return [run(k, v) for k, v in caches]

    return runs


def cublas_runs(n: int, k: int, m: int) -> list[Callable[[], None]]:
    """The same product in bf16 by cuBLAS, through torch."""
    count = copies_of(2 * n * k)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)

    def run(weight: torch.Tensor) -> Callable[[], None]:
        return lambda: torch.mm(x, weight.t(), out=out)

    return [run(weight) for weight in weights]


def attention_cases() -> Iterator[AttentionCase]:
    """Decode from short to long, few to many; prefill of whole prompts and of a chunk behind a prefix."""
    model = MODELS["llama-3-8b"]
    for num_seqs, context in ((1, 2048), (16, 2048), (64, 2048), (1, 32768), (16, 8192)):
        yield AttentionCase(model, num_seqs, context)
    yield AttentionCase(model, 16, 8192, kv="fp8")
    for num_seqs, context, query_len in ((1, 2048, 2048), (4, 4096, 4096), (1, 8192, 512)):
        yield AttentionCase(model, num_seqs, context, query_len)
