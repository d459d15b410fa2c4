"""The product of q, k and v that norms and turns its heads and writes the KV blocks, against float64."""

from dataclasses import dataclass

import pytest
import torch
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.epilogue import RopeKvEpilogue
from headrace.kernels.linear.triton import COUNTER_BYTES, linear, workspace_bytes

from tests.gpu.machine import lacks_fp8
from tests.gpu.numerics.linear_case import TOLERANCE, Case, dense_case, error, quant_case

EPS, FACTOR = 1e-3, 1.25
BLOCKS, BLOCK_SIZE = 6, 16  # and the null block


@dataclass(frozen=True)
class Result:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class HeadsCase:
    """heads, kv_heads of head_dim on the matrix of `product`. cache: the caches' dtype."""

    product: Case
    heads: int
    kv_heads: int
    head_dim: int
    cache: torch.dtype
    has_head_norm: bool = False
    has_rotation: bool = True

    def vectors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        inv_freq = 1.0 / 10000 ** (torch.arange(self.head_dim // 2) / (self.head_dim // 2))
        norms = torch.rand(2, self.head_dim, generator=generator) + 0.5
        return inv_freq.float(), norms[0], norms[1]

    def scales(self) -> torch.Tensor | None:
        return torch.linspace(0.12, 0.14, self.kv_heads) if self.cache.itemsize == 1 else None

    def run(self, x: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> Result:
        """q [M, H, D] and what the caches hold in `slots`; everything else in them must still be the poison."""
        device, m, packed = x.device, x.shape[0], self.product.packed
        inv_freq, q_norm, k_norm = (vector.to(device) for vector in self.vectors())
        scales = self.scales()
        shape = (BLOCKS + 1, self.kv_heads, BLOCK_SIZE, self.head_dim)
        k_cache, v_cache = (torch.full(shape, 77, device=device).to(self.cache) for _ in range(2))
        out = torch.full((m, packed.out_features), float("nan"), dtype=packed.dtype, device=device)
        workspace = torch.zeros(workspace_bytes(packed, m, self.product.config), dtype=torch.uint8, device=device)
        workspace[COUNTER_BYTES:] = 0xFF
        norm, bias = self.product.extras(str(device))
        linear(
            x,
            packed.to(device),
            out,
            norm=(norm, 1e-5) if self.product.norm else None,
            bias=bias if self.product.bias else None,
            rope_kv=RopeKvEpilogue(
                k_cache,
                v_cache,
                positions.to(device),
                slots.to(device),
                self.head_dim,
                self.heads,
                inv_freq if self.has_rotation else None,
                FACTOR,
                q_norm if self.has_head_norm else None,
                k_norm if self.has_head_norm else None,
                EPS,
                None if scales is None else scales.to(device),
                None if scales is None else scales.to(device),
            ),
            workspace=workspace,
            config=self.product.config,
        )
        width = self.heads * self.head_dim
        assert out[:, width:].isnan().all(), "only q's columns are written"
        k, v = (self._taken(cache, slots, scales) for cache in (k_cache, v_cache))
        return Result(out[:, :width].view(m, self.heads, self.head_dim), k, v)

    def _taken(self, cache: torch.Tensor, slots: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        """[M, Hk, D], zero for rows of the null block."""
        poison = torch.tensor(77).to(self.cache)
        values = cache.cpu().view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache.cpu()
        values = values.float().transpose(1, 2).reshape(-1, self.kv_heads, self.head_dim)
        raw = cache.cpu().transpose(1, 2).reshape(-1, self.kv_heads, self.head_dim)
        real = slots[slots < BLOCKS * BLOCK_SIZE].long()
        untouched = torch.ones(len(raw), dtype=torch.bool)
        untouched[real] = False
        assert (raw[untouched].float() == poison.float()).all(), "a slot of nobody was written"
        taken = torch.zeros(len(slots), self.kv_heads, self.head_dim)
        taken[slots < BLOCKS * BLOCK_SIZE] = values[real]
        return taken if scales is None else taken * scales[None, :, None]

    def want(self, x: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> Result:
        y = self.product.want(x).view(len(x), -1, self.head_dim)
        q, k, v = y.split([self.heads, self.kv_heads, self.kv_heads], 1)
        inv_freq, q_norm, k_norm = self.vectors()
        is_kept = (slots < BLOCKS * BLOCK_SIZE)[:, None, None]
        turned = []
        for part, weight in ((q, q_norm), (k, k_norm)):
            if self.has_head_norm:
                part = part / torch.sqrt((part * part).mean(2, keepdim=True) + EPS) * weight.double()
            if self.has_rotation:
                angle = (positions.float()[:, None] * inv_freq).double()[:, None, :]
                cos, sin = angle.cos() * FACTOR, angle.sin() * FACTOR
                a, b = part.chunk(2, 2)
                part = torch.cat([a * cos - b * sin, b * cos + a * sin], 2)
            turned.append(part)
        return Result(turned[0], turned[1] * is_kept, v * is_kept)


def heads_case(heads: int, kv_heads: int, head_dim: int, cache: torch.dtype, kind: str, **options: bool) -> HeadsCase:
    rows = (heads + 2 * kv_heads) * head_dim
    fused = {"norm": True, "bias": True}
    if kind == "dense":
        product = dense_case(rows, 96, torch.float16, **fused)
    else:
        product = quant_case("int4", rows, 512, 32, "any", torch.float16, **fused)
    return HeadsCase(product, heads, kv_heads, head_dim, cache, **options)


def batch(case: HeadsCase, m: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows at scattered slots; every fifth row pads, in the null block."""
    generator = torch.Generator().manual_seed(m)
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=generator)[:m].int()
    slots[4::5] = BLOCKS * BLOCK_SIZE
    positions = torch.randint(0, 9000, (m,), generator=generator, dtype=torch.int32)
    return case.product.rows(m, device), positions, slots


def check(case: HeadsCase, m: int, device: str) -> None:
    x, positions, slots = batch(case, m, device)
    got, want = case.run(x, positions, slots), case.want(x, positions, slots)
    tolerance = TOLERANCE[torch.float16]
    assert error(got.q, want.q) < tolerance
    # int8 keeps steps of a scale of 0.12 to 0.14 where values are about 2; e4m3 keeps 4 bits.
    kept = {torch.int8: 0.03, torch.uint8: 0.04, torch.float8_e4m3fn: 0.04}.get(case.cache, tolerance)
    assert error(got.k, want.k) < kept
    assert error(got.v, want.v) < kept


@pytest.mark.parametrize("kind", ["int4", "dense"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 2, 64), (2, 1, 128), (3, 1, 32), (1, 1, 256)])
def test_heads(heads: int, kv_heads: int, head_dim: int, kind: str, device: str) -> None:
    check(heads_case(heads, kv_heads, head_dim, torch.float16, kind), 6, device)


@pytest.mark.parametrize("cache", [torch.float16, torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_caches(cache: torch.dtype, device: str) -> None:
    if cache == torch.float8_e4m3fn and lacks_fp8(device):
        pytest.skip("this GPU has no fp8")  # before sm_89 Triton refuses the type; uint8, above, is what runs there
    check(heads_case(2, 2, 64, cache, "int4"), 6, device)


@pytest.mark.parametrize("has_rotation", [False, True])
@pytest.mark.parametrize("m", [1, 20, 40])
def test_norm_of_heads(m: int, has_rotation: bool, device: str) -> None:
    check(heads_case(2, 1, 64, torch.float16, "int4", has_head_norm=True, has_rotation=has_rotation), m, device)


def test_a_row_has_the_same_bits_alone_and_among_neighbours(device: str) -> None:
    case = heads_case(2, 1, 64, torch.float16, "int4", has_head_norm=True)
    assert case.product.packed.num_splits > 1
    x, positions, slots = batch(case, 65, device)
    alone = case.run(x[:1], positions[:1], slots[:1])
    for m in (2, 8, 65):
        got = case.run(x[:m], positions[:m], slots[:m])
        assert torch.equal(got.q[:1], alone.q), m
        assert torch.equal(got.k[:1], alone.k), m
        assert torch.equal(got.v[:1], alone.v), m


def test_a_configuration_for_other_tiles_is_adapted(device: str) -> None:
    case = heads_case(2, 1, 64, torch.float16, "int4")
    product = Case(**{**vars(case.product), "config": LinearConfig(16, 16, 1, 2)})
    check(HeadsCase(product, 2, 1, 64, torch.float16), 3, device)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "power of two"),
        ({"num_heads": 3}, "on a matrix of 256 rows"),
        ({"positions": torch.zeros(2, dtype=torch.int64)}, "positions"),
        ({"q_norm": torch.zeros(64)}, "go together"),
        ({"k_scale": torch.zeros(1)}, "quantised cache"),
        ({"inv_freq": torch.zeros(64)}, "inv_freq"),
        ({"v_cache": torch.zeros(3, 1, 8, 64, dtype=torch.float16)}, "v_cache"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, object], message: str, device: str) -> None:
    case = heads_case(2, 1, 64, torch.float16, "int4")
    cache, rows = torch.zeros(3, 1, 16, 64, dtype=torch.float16), torch.zeros(2, dtype=torch.int32)
    good = {"k_cache": cache, "v_cache": cache, "positions": rows, "slot_mapping": rows, "head_dim": 64, "num_heads": 2}
    epilogue = RopeKvEpilogue(**{**good, **change})  # type: ignore[arg-type]
    x, out = torch.zeros(2, 512, dtype=torch.float16), torch.zeros(2, 256, dtype=torch.float16)
    with pytest.raises(ValueError, match=message):
        linear(x, case.product.packed, out, rope_kv=epilogue)
