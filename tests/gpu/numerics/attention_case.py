"""Batches for the paged attention tests: scattered blocks, poisoned memory, and a float64 reference.

Used by test_paged_attention*.py. Everything that no sequence owns holds NaN: slots past a sequence's end, blocks of
nobody, blocks before a sliding window, table entries past a sequence's blocks (which name a block of nobody), `out`
and the workspace before the call.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from headrace.kernels.paged_attention import AttentionConfig
from headrace.kernels.paged_attention.triton import paged_attention, workspace_bytes

# Of the largest absolute value of the reference: what fp32 sums in another order, and roundings of P and of the
# output to 11 and 8 bits, may cost.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

E4M3 = (torch.float8_e4m3fn, torch.uint8)


@dataclass(frozen=True)
class Shape:
    """What a model fixes. kv: the cache's dtype, None: as `dtype`; torch.uint8: e4m3 by its bits."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    kv: torch.dtype | None = None
    scale: float = 0.17
    window: int = 0
    soft_cap: float = 0.0
    config: AttentionConfig = field(default_factory=lambda: AttentionConfig(block_n=16, split=64))


@dataclass(frozen=True)
class Sequence:
    """Keys, values [length, kv_heads, head_dim] and queries [rows, heads, head_dim], float32 on the CPU."""

    k: torch.Tensor
    v: torch.Tensor
    q: torch.Tensor

    @property
    def length(self) -> int:
        return len(self.k)

    def last(self, rows: int) -> "Sequence":
        return replace(self, q=self.q[-rows:])

    def first(self, length: int, rows: int) -> "Sequence":
        """The sequence when it had `length` positions, of which the last `rows` came with the step."""
        begin = len(self.q) - (self.length - length)
        return Sequence(self.k[:length], self.v[:length], self.q[begin - rows : begin])


def sequence(shape: Shape, length: int, rows: int, seed: int) -> Sequence:
    generator = torch.Generator().manual_seed(seed * 7919 + length)
    k, v = (torch.randn(length, shape.kv_heads, shape.head_dim, generator=generator) for _ in range(2))
    return Sequence(k, v, torch.randn(rows, shape.heads, shape.head_dim, generator=generator))


def run(
    shape: Shape, sequences: list[Sequence], device: str, *, seed: int = 0, pad_seqs: int = 0,
    max_seq_len: int | None = None, max_query_len: int | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """The kernel's output of each sequence, [rows, heads, head_dim] float32 on the CPU."""
    rng = np.random.default_rng(seed)
    size = shape.block_size
    counts = [math.ceil(s.length / size) for s in sequences]
    num_blocks = sum(counts) + 3
    order = rng.permutation(num_blocks).tolist()
    free = order.pop()
    tables = np.full((len(sequences) + pad_seqs, max(counts) + 2), free, np.int32)
    k_scale, v_scale = scales(shape)
    k_cache, v_cache = (_poisoned(shape, num_blocks + 1) for _ in range(2))
    for row, count, s in zip(tables, counts, sequences, strict=False):
        row[:count] = [order.pop() for _ in range(count)]
        seen_from = max(s.length - len(s.q) - shape.window + 1, 0) if shape.window else 0
        for cache, values, factors in ((k_cache, s.k, k_scale), (v_cache, s.v, v_scale)):
            stored = store(shape, values, factors)
            for pos in range(seen_from, s.length):
                cache[row[pos // size], :, pos % size] = stored[pos]
        row[: seen_from // size] = free
    rows = [len(s.q) for s in sequences] + [0] * pad_seqs
    total = sum(rows)
    fused = torch.full((total + 2, shape.heads + 3, shape.head_dim), math.nan, dtype=shape.dtype)  # q beside k and v
    fused[:total, : shape.heads] = torch.cat([s.q for s in sequences])
    out = torch.full((total + 2, shape.heads, shape.head_dim), math.nan, dtype=shape.dtype, device=device)
    bounds = {
        "num_seqs": len(rows),
        "max_query_len": max_query_len or max(rows),
        "max_seq_len": max_seq_len or max(s.length for s in sequences),
    }
    needed = workspace_bytes(
        num_heads=shape.heads, group=shape.heads // shape.kv_heads, head_dim=shape.head_dim, config=shape.config,
        **bounds,
    )  # fmt: skip
    workspace = torch.full((needed // 4,), math.nan, device=device).view(torch.uint8)
    has_scales = k_cache.element_size() == 1
    paged_attention(
        fused.to(device)[:total, : shape.heads],
        k_cache.to(device),
        v_cache.to(device),
        out[:total],
        cu_seqlens_q=_int32(np.cumsum([0, *rows]), device),
        seq_lens=_int32([s.length for s in sequences] + [0] * pad_seqs, device),
        block_tables=_int32(tables, device),
        scale=shape.scale,
        window=shape.window,
        soft_cap=shape.soft_cap,
        k_scale=k_scale.to(device) if has_scales else None,
        v_scale=v_scale.to(device) if has_scales else None,
        workspace=workspace,
        config=shape.config,
        **bounds,
    )
    assert out[total:].isnan().all(), "rows beyond the batch were written"
    return list(out[:total].float().cpu().split(rows[: len(sequences)]))


def expected(shape: Shape, s: Sequence) -> torch.Tensor:
    """float64 attention over what the cache holds (rounded keys and values), query by query."""
    k_scale, v_scale = (x.double()[None, :, None] for x in scales(shape))
    k = restore(shape, store(shape, s.k, scales(shape)[0])) * k_scale
    v = restore(shape, store(shape, s.v, scales(shape)[1])) * v_scale
    q = s.q.to(shape.dtype).double()
    group = shape.heads // shape.kv_heads
    out = torch.empty(len(q), shape.heads, shape.head_dim, dtype=torch.float64)
    for row in range(len(q)):
        pos = s.length - len(q) + row
        lo = max(pos - shape.window + 1, 0) if shape.window else 0
        for head in range(shape.heads):
            scores = k[lo : pos + 1, head // group] @ q[row, head] * shape.scale
            if shape.soft_cap:
                scores = shape.soft_cap * torch.tanh(scores / shape.soft_cap)
            out[row, head] = torch.softmax(scores, 0) @ v[lo : pos + 1, head // group]
    return out


def check(shape: Shape, sequences: list[Sequence], outs: list[torch.Tensor]) -> None:
    for index, (s, out) in enumerate(zip(sequences, outs, strict=True)):
        want = expected(shape, s)
        error = float((out.double() - want).abs().max() / want.abs().max())
        assert error <= TOLERANCE[shape.dtype], f"sequence {index} of {s.length}, {len(s.q)} rows: {error:.2e}"


def scales(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Per KV head, of k and of v: different for each, so that a swapped or forgotten scale shows."""
    if shape.kv is None:
        return torch.ones(shape.kv_heads), torch.ones(shape.kv_heads)
    base = 0.025 if shape.kv == torch.int8 else 0.01
    steps = torch.arange(1, shape.kv_heads + 1, dtype=torch.float32)
    return base * (1 + steps / 3), base * (1 + steps / 7)


def store(shape: Shape, values: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """As the cache holds it."""
    scaled = values / factors[None, :, None]
    if shape.kv == torch.int8:
        return scaled.round().clamp(-127, 127).to(torch.int8)
    if shape.kv in E4M3:
        bits = scaled.clamp(-448, 448).to(torch.float8_e4m3fn)
        return bits.view(torch.uint8) if shape.kv == torch.uint8 else bits
    return values.to(shape.kv or shape.dtype)


def restore(shape: Shape, stored: torch.Tensor) -> torch.Tensor:
    return (stored.view(torch.float8_e4m3fn) if shape.kv == torch.uint8 else stored).double()


def _poisoned(shape: Shape, num_blocks: int) -> torch.Tensor:
    size = (num_blocks, shape.kv_heads, shape.block_size, shape.head_dim)
    if shape.kv == torch.int8:
        return torch.full(size, -128, dtype=torch.int8)
    if shape.kv in E4M3:
        bits = torch.full(size, 0x7F, dtype=torch.uint8)  # NaN
        return bits if shape.kv == torch.uint8 else bits.view(torch.float8_e4m3fn)
    return torch.full(size, math.nan, dtype=shape.kv or shape.dtype)


def _int32(values: "np.ndarray | list[int]", device: str) -> torch.Tensor:
    return torch.from_numpy(np.asarray(values, np.int32)).to(device)
