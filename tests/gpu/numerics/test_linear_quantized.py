"""Products of 8-bit weights with 8-bit rows, and of fp8 weights with wide rows, against float64."""

import pytest
import torch
from headrace.kernels.linear import PackedLinear
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.quantize import (
    Quantized,
    pack_fp8,
    pack_fp8_block,
    pack_quantized,
    pack_w8a8,
    quantize_groups,
    quantize_rows,
    unpack_quantized,
)
from headrace.kernels.linear.triton import linear

from tests.gpu.machine import lacks_fp8
from tests.gpu.numerics.linear_case import TOLERANCE, Case, error

KINDS = ("w8a8", "fp8", "fp8_block")


def weights_of(rows: int, cols: int, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + cols)
    return [torch.randn(rows, cols, generator=generator) * 0.1 for _ in range(count)]


def pack_kind(kind: str, weights: list[torch.Tensor], dtype: torch.dtype, is_gated: bool = False) -> PackedLinear:
    if kind == "fp8_block":
        return pack_fp8_block(weights, dtype=dtype, is_gated=is_gated)
    return (pack_w8a8 if kind == "w8a8" else pack_fp8)(weights, dtype=dtype, is_gated=is_gated)


def case_of(
    kind: str,
    rows: int,
    cols: int,
    activation: str | None = None,
    dtype: torch.dtype = torch.float16,
    **options: object,
) -> Case:
    packed = pack_kind(kind, weights_of(rows, cols, 2 if activation else 1), dtype, activation is not None)
    return Case(packed, unpack_quantized(packed).double(), activation=activation, **options)  # type: ignore[arg-type]


def quantized_rows(case: Case, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, scales, what they stand for)."""
    x = torch.randn(m, case.packed.shape[1], generator=torch.Generator().manual_seed(m)) * 0.5
    if case.packed.kind == "fp8_block":
        q = quantize_groups(x)
        spread = q.scales.repeat_interleave(128, 1)[:, : x.shape[1]]
    else:
        q = quantize_rows(x, torch.int8 if case.packed.kind == "w8a8" else torch.float8_e4m3fn)
        spread = q.scales[:, None]
    return q.values, q.scales, q.values.double() * spread.double()


def check(case: Case, m: int, device: str) -> None:
    skip_without_fp8(case.packed.kind, device)
    values, scales, want = quantized_rows(case, m)
    got = case.run(values.to(device), scales.to(device))
    assert error(got, case.want(want)) < TOLERANCE[case.packed.dtype]


def skip_without_fp8(kind: str, device: str) -> None:
    if kind.startswith("fp8") and lacks_fp8(device):
        pytest.skip("this GPU multiplies no fp8")  # see lacks_fp8


@pytest.mark.parametrize("m", [1, 5, 17, 65])
@pytest.mark.parametrize(("rows", "cols"), [(70, 300), (128, 512)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_rows(kind: str, rows: int, cols: int, m: int, device: str) -> None:
    check(case_of(kind, rows, cols), m, device)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_fused(kind: str, device: str) -> None:
    check(case_of(kind, 144, 256, bias=True, residual=True, dtype=torch.bfloat16), 3, device)
    if kind != "fp8_block":
        check(case_of(kind, 72, 256, "silu", bias=True), 3, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["fp8", "fp8_block"])
def test_wide_rows_with_fp8_weights(kind: str, dtype: torch.dtype, device: str) -> None:
    case_of(kind, 70, 300, dtype=dtype, norm=True).check(3, device)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_among_neighbours(kind: str, device: str) -> None:
    skip_without_fp8(kind, device)
    case = case_of(kind, 96, 1024)
    assert case.packed.num_splits > 1
    values, scales, _ = quantized_rows(case, 65)
    values, scales = values.to(device), scales.to(device)
    alone = case.run(values[:1], scales[:1])
    for m in (2, 8, 65):
        assert torch.equal(case.run(values[:m], scales[:m])[:1], alone), m
    other = Case(**{**vars(case), "config": LinearConfig(32, 32, 2, 2, split_programs=0)})
    assert torch.equal(other.run(values[:1], scales[:1]), alone)


def test_int8_sums_are_exact(device: str) -> None:
    """Scales of 1 and sums below 2^24: every element is an integer, and it is the right one."""
    q = torch.randint(-127, 128, (48, 640), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    packed = pack_quantized("w8a8", Quantized(q, torch.ones(48)), [48], dtype=torch.float32)
    x = torch.randint(-127, 128, (5, 640), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    case = Case(packed, q.double())
    got = case.run(x.to(device), torch.ones(5, device=device))
    assert torch.equal(got.cpu().double(), x.double() @ q.double().T)


@pytest.mark.parametrize(
    ("kind", "is_gated"), [("w8a8", False), ("w8a8", True), ("fp8", False), ("fp8", True), ("fp8_block", False)]
)
def test_weights_are_kept_to_half_a_step(kind: str, is_gated: bool) -> None:
    weights = weights_of(130 if kind != "fp8_block" else 256, 200, 2)
    got = unpack_quantized(pack_kind(kind, weights, torch.float16, is_gated))
    want = torch.cat(weights)
    step = want.abs().amax() / 127 if kind == "w8a8" else want.abs() / 8 + 2e-3
    assert ((got - want).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize(
    ("kind", "x", "scale", "message"),
    [
        ("w8a8", torch.float16, None, "take int8"),
        ("w8a8", torch.int8, None, "x_scale"),
        ("fp8", torch.float16, (2,), "x_scale"),
        ("fp8_block", torch.float8_e4m3fn, (2,), r"want \[2, 2\]"),
    ],
)
def test_wrong_rows_are_named(kind: str, x: torch.dtype, scale: tuple[int, ...] | None, message: str) -> None:
    case = case_of(kind, 128, 256)
    with pytest.raises(ValueError, match=message):
        linear(
            torch.zeros(2, 256).to(x),
            case.packed,
            torch.zeros(2, 128, dtype=torch.float16),
            x_scale=None if scale is None else torch.ones(scale),
        )


def test_shapes_that_do_not_go_together() -> None:
    q = torch.zeros(8, 16, dtype=torch.int8)
    with pytest.raises(ValueError, match="scales"):
        pack_quantized("w8a8", Quantized(q, torch.ones(7)), [8], dtype=torch.float16)
    with pytest.raises(ValueError, match="cannot be joined"):
        pack_fp8_block([torch.zeros(100, 128), torch.zeros(100, 128)], dtype=torch.float16)
