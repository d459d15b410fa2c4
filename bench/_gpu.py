"""What bench/gpu.py, its phases and peers, and bench/tune.py share: shapes of models, operands, and a timer.

Times are of CUDA graphs of many launches, each on operands of its own as far as memory allows, so that neither the
launching CPU nor the L2 cache flatters a kernel. Nothing here has run on a GPU yet; `rehearse` makes everything so
small that Triton's interpreter gets through it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

MAX_COPIES = 32


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
        Model("tiny", 128, 256, 4, 2, 64, 256),  # for a rehearsal
    )
}


@dataclass(frozen=True)
class Scale:
    """How large a run is. models: tuned in this order, the first one is timed. rows: of timed and of tuned products.
    cold_bytes: operands that take turns, several times the largest L2 cache. rounds: replays of a graph that is timed.
    loads: (streams, requests) of the server."""

    device: str = "cuda"
    models: tuple[str, ...] = ("llama-3-8b", "smollm2-135m")
    rows: tuple[int, ...] = (1, 4, 16, 64, 512)
    tuned_rows: tuple[int, ...] = (16, 64)
    cold_bytes: int = 512 << 20
    rounds: int = 7
    steps: int = 64
    decode_seqs: tuple[int, ...] = (1, 16, 64)
    loads: tuple[tuple[int, int], ...] = ((1, 8), (16, 64), (64, 256))
    prompt_tokens: int = 256
    output_tokens: int = 128


scale = Scale()


def rehearse() -> None:
    """Make everything tiny, on the CPU."""
    global scale
    from tests.gpu.interpreter import install

    install()
    scale = Scale(
        device="cpu",
        models=("tiny",),
        rows=(1, 16),
        tuned_rows=(16,),
        cold_bytes=1 << 12,
        rounds=1,
        steps=1,
        decode_seqs=(1, 2),
        loads=((1, 1),),
        prompt_tokens=4,
        output_tokens=2,
    )


def is_rehearsal() -> bool:
    return scale.device == "cpu"


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


def arch() -> str:
    """ "sm_90"; "interpreter" in a rehearsal."""
    return "interpreter" if is_rehearsal() else str(gpu_line()["arch"])


def copies_of(num_bytes: int) -> int:
    """How many copies of an operand take turns."""
    return max(1, min(MAX_COPIES, scale.cold_bytes // max(1, num_bytes)))


def microseconds(runs: Sequence[Callable[[], None]], launches: int = 64) -> float:
    """Median time of one run, of some replays of a graph of `launches` runs, taken in turn."""
    if is_rehearsal():
        begin_s = time.perf_counter()
        runs[0]()
        return (time.perf_counter() - begin_s) * 1e6
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(launches):
            runs[index % len(runs)]()
    graph.replay()
    times = []
    for _ in range(scale.rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s read plus written by a copy that fits no cache: what floors are computed from."""
    source = torch.empty(scale.cold_bytes, dtype=torch.uint8, device=scale.device)
    target = torch.empty_like(source)
    return 2 * scale.cold_bytes / microseconds([lambda: target.copy_(source)], 8) / 1e3


def random_packed(kind: str, n: int, k: int, *, is_gated: bool) -> Any:
    """A packed matrix of random bits: "int4" or "int8" in groups of 32 with zeros, or "dense" in bf16."""
    device = scale.device
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
    """From a LinearConfig (None: the default) to launches of one product of m rows, each on a weight of its own."""
    from headrace.kernels.linear.triton import linear, workspace_bytes

    first = random_packed(kind, n, k, is_gated=is_gated)
    weights = [first] + [random_packed(kind, n, k, is_gated=is_gated) for _ in range(copies_of(first.num_bytes) - 1)]
    x = torch.randn(m, k, device=scale.device, dtype=torch.bfloat16)
    out = torch.empty(m, first.out_features, device=scale.device, dtype=torch.bfloat16)
    activation = "silu" if is_gated else None

    def runs(config: Any) -> Runs:
        workspace = torch.zeros(workspace_bytes(first, m, config), dtype=torch.uint8, device=scale.device)

        def run(weight: Any) -> Callable[[], None]:
            return lambda: linear(x, weight, out, activation=activation, workspace=workspace, config=config)

        return [run(weight) for weight in weights]

    return runs


def timed_products() -> Iterator[tuple[int, tuple[str, int, int, bool]]]:
    """(rows, product) of every product of a layer that is timed."""
    for m in scale.rows:
        for product in MODELS[scale.models[0]].products()[:4]:
            yield m, product


@dataclass(frozen=True)
class AttentionCase:
    """num_seqs sequences of `context` positions with query_len rows each."""

    model: Model
    num_seqs: int
    context: int
    query_len: int = 1
    kv: str = "bf16"

    def __str__(self) -> str:
        return f"{self.num_seqs} x {self.context}, {self.query_len} rows, kv {self.kv}"

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


@dataclass(frozen=True)
class AttentionOperands:
    """Of one case: q and out [tokens, heads, head_dim], caches that take turns, and what else the contract asks."""

    case: AttentionCase
    q: torch.Tensor
    out: torch.Tensor
    caches: list[tuple[torch.Tensor, torch.Tensor]]
    shared: dict[str, Any]


def attention_operands(case: AttentionCase, block_size: int = 64) -> AttentionOperands:
    """Keys and values in permuted blocks."""
    from headrace.kernels.gpu.cache import storage_dtype

    model, device = case.model, scale.device
    blocks = -(-case.context // block_size)
    dtype = storage_dtype(case.kv, None if is_rehearsal() else torch.cuda.get_device_capability())
    compute = torch.float16 if case.kv == "fp8" else torch.bfloat16
    shape = (case.num_seqs * blocks + 1, model.kv_heads, block_size, model.head_dim)
    tables = torch.randperm(case.num_seqs * blocks, device=device).to(torch.int32).view(case.num_seqs, blocks)
    rows = case.num_seqs * case.query_len
    q = torch.randn(rows, model.heads, model.head_dim, device=device, dtype=compute)
    factor = torch.ones(model.kv_heads, device=device) if dtype.itemsize == 1 else None

    def cache() -> torch.Tensor:
        values = torch.randn(shape, device=device, dtype=torch.float16).to(compute)
        return values if dtype.itemsize > 1 else values.to(torch.float8_e4m3fn).view(torch.uint8).view(dtype)

    shared = {
        "cu_seqlens_q": torch.arange(0, rows + 1, case.query_len, device=device, dtype=torch.int32),
        "seq_lens": torch.full((case.num_seqs,), case.context, device=device, dtype=torch.int32),
        "block_tables": tables,
        "num_seqs": case.num_seqs,
        "max_query_len": case.query_len,
        "max_seq_len": case.context,
        "scale": model.head_dim**-0.5,
        "k_scale": factor,
        "v_scale": factor,
    }
    caches = [(cache(), cache()) for _ in range(min(4, copies_of(case.kv_bytes)))]
    return AttentionOperands(case, q, torch.empty_like(q), caches, shared)


def attention_runs(operands: AttentionOperands, attend: Callable[..., None] | None = None) -> Callable[[Any], Runs]:
    """From an AttentionConfig to launches of paged attention (ours, or `attend`), each over a cache of its own."""
    from headrace.kernels.paged_attention.triton import paged_attention, workspace_bytes

    model, shared = operands.case.model, operands.shared
    sizes = {name: shared[name] for name in ("num_seqs", "max_query_len", "max_seq_len")}
    group = model.heads // model.kv_heads
    attend = attend or paged_attention

    def runs(config: Any) -> Runs:
        need = workspace_bytes(num_heads=model.heads, group=group, head_dim=model.head_dim, config=config, **sizes)
        workspace = torch.empty(max(16, need), dtype=torch.uint8, device=scale.device)

        def run(k: torch.Tensor, v: torch.Tensor) -> Callable[[], None]:
            return lambda: attend(operands.q, k, v, operands.out, **shared, workspace=workspace, config=config)

        return [run(k, v) for k, v in operands.caches]

    return runs


def attention_config(case: AttentionCase, block_size: int = 64, *, is_tuned: bool = True) -> Any:
    """What the executor would launch such a case with (`headrace.kernels.gpu.setup.attention_config`)."""
    from headrace.kernels.gpu import tuning
    from headrace.kernels.paged_attention import default_config

    model, kv_bytes = case.model, 1 if case.kv == "fp8" else 2
    sizes: dict[str, Any] = {"head_dim": model.head_dim, "block_size": block_size}
    default = default_config(**sizes, compute_bytes=2, kv_bytes=kv_bytes, arch=arch())
    if is_rehearsal() or not is_tuned:
        return default
    kv = {"group": model.heads // model.kv_heads, "kv_dtype": case.kv}
    return replace(default, **tuning.lookup("paged_attention", gpu_line()["gpu"], arch(), m=1, **sizes, **kv))


def attention_cases() -> Iterator[AttentionCase]:
    """Decode from short to long, few to many; prefill of whole prompts and of a chunk behind a prefix."""
    model = MODELS[scale.models[0]]
    if is_rehearsal():
        yield from (AttentionCase(model, 2, 80), AttentionCase(model, 1, 70, kv="fp8"), AttentionCase(model, 1, 66, 66))
        return
    for num_seqs, context in ((1, 2048), (16, 2048), (64, 2048), (1, 32768), (16, 8192)):
        yield AttentionCase(model, num_seqs, context)
    yield AttentionCase(model, 16, 8192, kv="fp8")
    for num_seqs, context, query_len in ((1, 2048, 2048), (4, 4096, 4096), (1, 8192, 512)):
        yield AttentionCase(model, num_seqs, context, query_len)
