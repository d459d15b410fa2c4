"""Products of many rows: a program takes several tiles, sums of groups are made by a launch of their own, and operands
come by TMA where there is it. Against float64, and bit by bit against few rows and against the pointer twin."""

from dataclasses import replace

import pytest
import torch
from headrace.kernels.linear import PackedLinear
from headrace.kernels.linear.config import LinearConfig, default_config, for_heads
from headrace.kernels.linear.quantize import pack_fp8_block, unpack_quantized
from headrace.kernels.linear.triton import linear

from tests.gpu.numerics.linear_case import TOLERANCE, Case, dense_case, error, quant_case
from tests.gpu.numerics.test_linear_quantized import case_of, quantized_rows, skip_without_fp8, weights_of

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
MANY = LinearConfig(64, 32, 4, 2, group_n=2, split_programs=0, programs_per_sm=1)
FEW = LinearConfig(16, 32, 2, 2)


def with_config(case: Case, config: LinearConfig) -> Case:
    return replace(case, config=config)


def has_tma(device: str) -> bool:
    """The interpreter reads descriptors; a GPU before sm_90 does not."""
    return device == "cpu" or torch.cuda.get_device_capability() >= (9, 0)


CASES = {
    "int4 zeros": lambda: quant_case("int4", 70, 256, 32, "any", HALF, norm=True, residual=True),
    "int4 one group": lambda: quant_case("int4", 96, 512, 128, "any", BRAIN, bias=True),
    "int4 gated": lambda: quant_case("int4", 40, 256, 64, "centre", HALF, "silu", norm=True),
    "int8 zeros": lambda: quant_case("int8", 130, 192, 16, "any", HALF),
    "int8": lambda: quant_case("int8", 70, 128, 32, "none", BRAIN, residual=True),
    "dense": lambda: dense_case(96, 500, HALF, norm=True, bias=True),
    "dense gated": lambda: dense_case(40, 150, BRAIN, "gelu_tanh", bias=True),
    "int4 single": lambda: quant_case("int4", 64, 512, 32, "any", SINGLE, norm=True),
    "dense single": lambda: dense_case(96, 500, SINGLE, norm=True),
}


@pytest.mark.parametrize("m", [65, 131])
@pytest.mark.parametrize("name", CASES)
def test_many_rows(name: str, m: int, device: str) -> None:
    with_config(CASES[name](), MANY).check(m, device)


@pytest.mark.parametrize("name", CASES)
def test_the_defaults(name: str, device: str) -> None:
    CASES[name]().check(100, device)


@pytest.mark.parametrize("name", CASES)
def test_a_row_has_the_bits_that_it_has_among_few(name: str, device: str) -> None:
    case = CASES[name]()
    x = case.rows(70, device)
    residual = case.residual_of(70, device) if case.residual else None
    many = with_config(case, MANY).run(x, residual=residual)
    for first, last in ((0, 3), (60, 70)):
        part = None if residual is None else residual[first:last]
        few = with_config(case, FEW).run(x[first:last], residual=part)
        assert torch.equal(many[first:last], few), (first, last)


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("name", ["int4 zeros", "dense single"])
def test_tiles_do_not_change_bits(name: str, block_m: int, device: str) -> None:
    case = CASES[name]()
    x = case.rows(70, device)
    want = with_config(case, MANY).run(x)
    for group_n, programs in ((1, 2), (8, 1)):
        config = replace(MANY, block_m=block_m, block_n=64, group_n=group_n, programs_per_sm=programs)
        assert torch.equal(with_config(case, config).run(x), want)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize(("rows", "cols"), [(33, 77), (130, 200), (64, 512)])
def test_descriptors_bring_what_pointers_bring(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    """x of 77 columns has no 16-byte rows: pointers, with the same result."""
    if not has_tma(device):
        pytest.skip("TMA is on sm_90 and newer")
    case = dense_case(rows, cols, dtype, bias=True)
    x = case.rows(67, device)
    got = with_config(case, replace(MANY, has_tma=True)).run(x)
    assert torch.equal(got, with_config(case, MANY).run(x))
    assert error(got, case.want(x)) < TOLERANCE[dtype]


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("kind", ["w8a8", "fp8", "fp8_block"])
def test_rows_in_8_bits(kind: str, activation: str | None, device: str) -> None:
    skip_without_fp8(kind, device)
    weights = weights_of(150, 400, 2 if activation else 1)
    if kind == "fp8_block":
        packed: PackedLinear = pack_fp8_block(weights, dtype=HALF, is_gated=activation is not None)
        case = Case(packed, unpack_quantized(packed).double(), activation=activation, bias=True)
    else:
        case = case_of(kind, 150, 400, activation, bias=True)
    values, scales, want = quantized_rows(case, 70)
    values, scales = values.to(device), scales.to(device)
    got = with_config(case, MANY).run(values, scales)
    assert error(got, case.want(want)) < TOLERANCE[HALF]
    assert torch.equal(with_config(case, FEW).run(values[:3], scales[:3]), got[:3])
    assert torch.equal(with_config(case, replace(MANY, block_n=128)).run(values, scales), got)
    if scales.ndim == 2:  # a scale per row and block may lie either way
        turned = scales.t().contiguous().t()
        assert torch.equal(with_config(case, MANY).run(values, turned), got)
    if has_tma(device):
        assert torch.equal(with_config(case, replace(MANY, has_tma=True)).run(values, scales), got)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize("kind", ["fp8", "fp8_block"])
def test_wide_rows_with_fp8_weights(kind: str, dtype: torch.dtype, device: str) -> None:
    case = with_config(case_of(kind, 70, 304, dtype=dtype, norm=True), MANY)
    case.check(66, device)
    if has_tma(device):
        x = case.rows(66, device)
        assert torch.equal(with_config(case, replace(MANY, has_tma=True)).run(x), case.run(x))


@pytest.mark.parametrize("rows", [72, 136, 300])
def test_gate_and_up_in_fp8_blocks(rows: int, device: str) -> None:
    """Each half has blocks of its own, also where it is not a whole number of them."""
    skip_without_fp8("fp8_block", device)
    packed = pack_fp8_block(weights_of(rows, 256, 2), dtype=BRAIN, is_gated=True)
    case = Case(packed, unpack_quantized(packed).double(), activation="silu")
    source = torch.cat(weights_of(rows, 256, 2))
    assert float((unpack_quantized(packed) - source).norm() / source.norm()) < 0.03  # e4m3: 3 bits
    values, scales, want = quantized_rows(case, 5)
    got = case.run(values.to(device), scales.to(device))
    assert error(got, case.want(want)) < TOLERANCE[BRAIN]


def test_neighbours_that_are_not_finite_stay_alone(device: str) -> None:
    case = with_config(CASES["int4 zeros"](), MANY)
    x = case.rows(70, device)
    want = case.run(x)
    x[2], x[65] = float("nan"), float("inf")
    got = case.run(x)
    finite = [row for row in range(70) if row not in (2, 65)]
    assert torch.equal(got[finite], want[finite])
    assert got[2].isnan().all()


def test_a_workspace_without_room_for_sums_is_named(device: str) -> None:
    case = CASES["int4 one group"]()
    x, out = case.rows(70, device), torch.empty(70, 96, dtype=BRAIN, device=device)
    with pytest.raises(ValueError, match=r"workspace of \d+ bytes"):
        linear(x, case.packed.to(device), out, config=MANY)


@pytest.mark.parametrize("arch", ["", "sm_80", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_every_target_has_defaults(arch: str) -> None:
    for kind in ("int4", "int8", "dense", "w8a8", "fp8", "fp8_block"):
        for groups, zeros, splits in ((1, False, 1), (1, True, 4), (4, True, 1), (4, True, 8)):
            many = default_config(kind, 65, groups=groups, has_zeros=zeros, splits=splits, arch=arch)
            assert (many.programs_per_sm, many.split_programs) == (1, 0)
            assert many.has_tma == (arch in ("sm_90", "sm_100") and kind not in ("int4", "int8"))
            assert for_heads(many, kind, 128, has_head_norm=True, arch=arch).block_n == 128
    with pytest.raises(ValueError, match="has_tma needs"):
        LinearConfig(has_tma=True)
