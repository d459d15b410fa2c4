"""Rotary embedding, QK-norm and KV write against float64, and the device functions that the qkv product shares."""

from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl
from headrace.kernels.rope import rope, rope_table
from headrace.kernels.rope.triton import RopeConfig, rope_kv
from headrace.kernels.rope.triton_math import cos_sin, norm_heads, rope_angles, rotate_heads

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# What rounding may cost: half a step, which int8 takes from the largest value of the scale, e4m3 from the value itself.
KV_TOLERANCE = {torch.int8: 0.51 / 127, torch.float8_e4m3fn: 0.51 / 8, torch.uint8: 0.51 / 8}
POSITIONS = [0, 1, 77, 8191, 131071, 1048575]
SLOTS = [35, 3, 0, 17, 63, 40]  # of blocks of 16: scattered, and all different
EPS = 1e-3


@dataclass(frozen=True)
class Case:
    head_dim: int
    heads: int
    kv_heads: int
    dtype: torch.dtype
    kv: torch.dtype | None = None
    has_norm: bool = False
    factor: float = 1.0

    def run(self, device: str, rows: slice = slice(None), config: RopeConfig | None = None) -> "Result":
        generator = torch.Generator().manual_seed(self.head_dim)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        buffer = torch.randn(len(POSITIONS), width, generator=generator).to(self.dtype).to(device)[rows]
        q, k, v = buffer.split([self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2], dim=1)
        before = buffer.cpu().double()
        kv = self.kv or self.dtype
        shape = (5, self.kv_heads, 16, self.head_dim)
        caches = [
            torch.full(shape, 77, dtype=torch.uint8 if kv.itemsize == 1 else kv, device=device).view(kv) for _ in "kv"
        ]
        scales = [torch.rand(self.kv_heads, generator=generator).add(1.0).to(device) / 32 for _ in "kv"]
        norms = [torch.randn(self.head_dim, generator=generator).to(device) for _ in "qk"]
        rope_kv(
            q,
            k,
            v,
            *caches,
            positions=torch.tensor(POSITIONS, dtype=torch.int32, device=device)[rows],
            slot_mapping=torch.tensor(SLOTS, dtype=torch.int32, device=device)[rows],
            inv_freq=self.inv_freq.to(device),
            attention_factor=self.factor,
            head_dim=self.head_dim,
            q_norm=norms[0] if self.has_norm else None,
            k_norm=norms[1] if self.has_norm else None,
            eps=EPS,
            k_scale=scales[0] if self.kv else None,
            v_scale=scales[1] if self.kv else None,
            config=config,
        )
        return Result(
            self, before, [norm.cpu() for norm in norms], q, [c.cpu() for c in caches], [s.cpu() for s in scales]
        )

    @property
    def inv_freq(self) -> torch.Tensor:
        return 10000.0 ** (-torch.arange(0, self.head_dim, 2).float() / self.head_dim)


@dataclass(frozen=True, eq=False)
class Result:
    """before: the qkv buffer, float64."""

    case: Case
    before: torch.Tensor
    norms: list[torch.Tensor]
    q: torch.Tensor
    caches: list[torch.Tensor]
    scales: list[torch.Tensor]

    def check(self) -> None:
        case = self.case
        q, k, v = self.before.split([case.heads * case.head_dim, *[case.kv_heads * case.head_dim] * 2], dim=1)
        want_q = self.turned(q, self.norms[0])
        got_q = self.q.cpu().double()
        assert ((got_q - want_q).abs() <= TOLERANCE[case.dtype] * want_q.abs().amax()).all()
        for cache, scale, want in zip(self.caches, self.scales, (self.turned(k, self.norms[1]), v), strict=True):
            self.check_cache(cache, scale, want.view(len(POSITIONS), case.kv_heads, case.head_dim))

    def check_cache(self, cache: torch.Tensor, scale: torch.Tensor, want: torch.Tensor) -> None:
        kv = self.case.kv
        values = (cache.view(torch.float8_e4m3fn) if kv == torch.uint8 else cache).double()
        tolerance = TOLERANCE[self.case.dtype] * want.abs().amax()
        if kv is not None:
            limit = scale.double()[None, :, None] * (127.0 if kv == torch.int8 else 448.0)
            want = want.clamp(-limit, limit)
            values = values * scale.double()[None, :, None, None]
            size = limit if kv == torch.int8 else want.abs() + limit * 2.0**-15
            tolerance = KV_TOLERANCE[kv] * size + TOLERANCE[self.case.dtype] * want.abs()
        got = torch.stack([values[slot // 16, :, slot % 16] for slot in SLOTS])
        assert ((got - want).abs() <= tolerance).all()
        # Nothing else was touched.
        others = [slot for slot in range(5 * 16) if slot not in SLOTS]
        raw = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
        assert all((raw[slot // 16, :, slot % 16] == 77).all() for slot in others)

    def turned(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        heads = x.view(len(x), -1, self.case.head_dim)
        if self.case.has_norm:
            heads = heads / (heads.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * norm.double()
        angle = (torch.tensor(POSITIONS).float()[:, None] * self.case.inv_freq).double()[:, None]
        cos, sin = angle.cos() * self.case.factor, angle.sin() * self.case.factor
        first, second = heads.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).reshape(x.shape)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads"), [(64, 9, 3), (80, 4, 4), (96, 3, 1), (128, 8, 2), (256, 2, 1)]
)
def test_q_is_turned_and_k_and_v_are_written(
    head_dim: int, heads: int, kv_heads: int, dtype: torch.dtype, device: str
) -> None:
    Case(head_dim, heads, kv_heads, dtype).run(device).check()


@pytest.mark.parametrize("kv", KV_TOLERANCE)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_eight_bit_caches(kv: torch.dtype, dtype: torch.dtype, device: str) -> None:
    Case(64, 4, 2, dtype, kv).run(device).check()


@pytest.mark.parametrize("head_dim", [64, 80])
def test_heads_are_normed_first_and_attention_factor_scales(head_dim: int, device: str) -> None:
    Case(head_dim, 5, 3, torch.float32, has_norm=True, factor=1.3).run(device).check()
    Case(head_dim, 5, 3, torch.float16, torch.int8, has_norm=True, factor=0.8).run(device).check()


def test_heads_per_program_do_not_matter(device: str) -> None:
    case = Case(64, 9, 3, torch.float16, has_norm=True)
    one, many = (case.run(device, config=RopeConfig(heads, 1)) for heads in (1, 16))
    one.check()
    assert torch.equal(one.q, many.q)
    assert all(torch.equal(a, b) for a, b in zip(one.caches, many.caches, strict=True))


def test_a_row_does_not_depend_on_its_neighbours(device: str) -> None:
    case = Case(64, 9, 3, torch.bfloat16, torch.int8, has_norm=True)
    together = case.run(device)
    for row in range(len(POSITIONS)):
        alone = case.run(device, slice(row, row + 1))
        assert torch.equal(alone.q[0], together.q[row])
        slot = SLOTS[row]
        for a, b in zip(alone.caches, together.caches, strict=True):
            assert torch.equal(a[slot // 16, :, slot % 16], b[slot // 16, :, slot % 16])


def test_the_reference_agrees(device: str) -> None:
    case = Case(64, 3, 1, torch.float32)
    result = case.run(device)
    table = rope_table(torch.tensor(POSITIONS).float(), case.inv_freq, 1.0)
    want = rope(result.before[:, : 3 * 64].float(), table)
    torch.testing.assert_close(result.q.cpu(), want, rtol=0.0, atol=2e-6)


def test_parts(device: str) -> None:
    """Only q, and q without a rotation: what models whose k is turned elsewhere ask for."""
    x = torch.randn(3, 128, device=device)
    rows = {"positions": torch.arange(3, dtype=torch.int32, device=device)}
    rows["slot_mapping"] = rows["positions"]
    q = x.clone()
    weight = torch.randn(64, device=device)
    rope_kv(q, None, None, None, None, **rows, inv_freq=None, attention_factor=1.0, head_dim=64, q_norm=weight, eps=EPS)
    heads = x.view(3, 2, 64)
    want = heads / (heads.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight
    torch.testing.assert_close(q, want.view(3, 128), rtol=1e-5, atol=1e-5)
    caches = [torch.zeros(1, 2, 16, 64, device=device) for _ in "kv"]
    rope_kv(None, x, x * 2, *caches, **rows, inv_freq=None, attention_factor=1.0, head_dim=64)
    assert torch.equal(caches[0][0, :, :3].transpose(0, 1).reshape(3, 128), x)
    assert torch.equal(caches[1], caches[0] * 2)


def test_what_does_not_fit_is_refused(device: str) -> None:
    x, cache = torch.zeros(2, 128, device=device), torch.zeros(2, 2, 16, 64, device=device)
    ids, inv_freq = torch.zeros(2, dtype=torch.int32, device=device), torch.ones(32, device=device)
    good = {"positions": ids, "slot_mapping": ids, "inv_freq": inv_freq, "attention_factor": 1.0, "head_dim": 64}
    for tensors, changes in (
        ((x, x, x, cache, cache), {"positions": ids.long()}),
        ((x, x, x, cache, cache), {"inv_freq": inv_freq[:5]}),
        ((x, x, x, cache, cache), {"q_norm": inv_freq}),
        ((x, x, x, cache, cache), {"k_scale": inv_freq[:2], "v_scale": inv_freq[:2]}),
        ((x, x, x, cache.to(torch.int8), cache.to(torch.int8)), {}),
        ((x, x, x, cache, cache[:, :1]), {}),
        ((x, x[:, :64], x, cache, cache), {}),
        ((x, x, None, cache, cache), {}),
        ((x.T, x, x, cache, cache), {}),
    ):
        with pytest.raises(ValueError, match="rope_kv"):
            rope_kv(*tensors, **{**good, **changes})


@triton.jit
def cos_sin_kernel(angle, cos_out, sin_out, N: tl.constexpr):
    place = tl.program_id(0) * N + tl.arange(0, N)
    cos_value, sin_value = cos_sin(tl.load(angle + place))
    tl.store(cos_out + place, cos_value)
    tl.store(sin_out + place, sin_value)


def test_cos_and_sin_of_all_angles_that_occur(device: str) -> None:
    small = torch.linspace(0.0, 100.0, 2**14)
    large = torch.logspace(0, 20, 2**14, base=2.0)
    # Next to multiples of pi / 2, where almost everything cancels.
    multiples = (
        torch.randint(1, 667_544, (2**14,), generator=torch.Generator().manual_seed(0)) * (torch.pi / 2)
    ).float()
    angle = torch.cat((small, large, multiples)).to(device)
    got = [torch.full_like(angle, torch.nan) for _ in range(2)]
    cos_sin_kernel[(len(angle) // 4096,)](angle, *got, 4096)
    wide = angle.cpu().double()
    for values, want in zip(got, (wide.cos(), wide.sin()), strict=True):
        assert (values.cpu().double() - want).abs().max() < 2e-7


@triton.jit
def tile_kernel(x, weight, positions, inv_freq, out, M: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    WIDTH: tl.constexpr = NUM_HEADS * HEAD_DIM
    place = tl.arange(0, M)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tile = norm_heads(tl.load(x + place), tl.load(weight + tl.arange(0, HEAD_DIM)), 1e-3, M, NUM_HEADS, HEAD_DIM)
    half = tl.load(inv_freq + tl.arange(0, HEAD_DIM // 2))
    cos_value, sin_value = rope_angles(tl.load(positions + tl.arange(0, M)), half, 1.25)
    tl.store(out + place, rotate_heads(tile, cos_value, sin_value, M, NUM_HEADS, HEAD_DIM))


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 64), (2, 64), (1, 128), (4, 16)])
def test_a_tile_of_heads_gets_what_the_kernel_gives(heads: int, head_dim: int, device: str) -> None:
    x, weight = torch.randn(16, heads * head_dim, device=device), torch.randn(head_dim, device=device)
    positions = torch.arange(16, dtype=torch.int32, device=device) * 517
    inv_freq = (10000.0 ** (-torch.arange(0, head_dim, 2).float() / head_dim)).to(device)
    out, q = torch.full_like(x, torch.nan), x.clone()
    tile_kernel[(1,)](x, weight, positions, inv_freq, out, 16, heads, head_dim)
    rope_kv(
        q,
        None,
        None,
        None,
        None,
        positions=positions,
        slot_mapping=positions,
        inv_freq=inv_freq,
        attention_factor=1.25,
        head_dim=head_dim,
        q_norm=weight,
        eps=1e-3,
    )
    torch.testing.assert_close(out, q, rtol=1e-6, atol=1e-6)
