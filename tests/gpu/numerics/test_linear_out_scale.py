"""Products whose output is quantised, by 128 columns of a row or by rows, in one launch or two, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.triton import COUNTER_BYTES, linear, workspace_bytes

from tests.gpu.numerics.linear_case import Case, dense_case, quant_case
from tests.gpu.numerics.test_linear_quantized import case_of, quantized_rows, skip_without_fp8
from tests.gpu.numerics.test_quantize_rows import assert_near


def run(
    case: Case, x: torch.Tensor, x_scale: torch.Tensor | None, dtype: torch.dtype, in_groups: bool = True
) -> torch.Tensor:
    """The values that the output stands for; columns beyond it must keep their poison."""
    device, m, n = x.device, x.shape[0], case.packed.out_features
    wide = torch.full((m, n + 16), 0x55, dtype=torch.uint8, device=device)
    groups = -(-n // 128)
    scale = torch.full((m, groups + 1) if in_groups else (m,), float("nan"), device=device)
    size = workspace_bytes(case.packed, m, case.config, has_out_scale=True)
    workspace = torch.zeros(size, dtype=torch.uint8, device=device)
    workspace[COUNTER_BYTES:] = 0xFF
    _, bias = case.extras(str(device))
    linear(
        x,
        case.packed.to(device),
        wide[:, :n].view(dtype),
        bias=bias if case.bias else None,
        activation=case.activation,
        x_scale=x_scale,
        out_scale=scale[:, :groups] if in_groups else scale,
        workspace=workspace,
        config=case.config,
    )
    assert (wide[:, n:] == 0x55).all()
    assert not in_groups or scale[:, groups:].isnan().all()
    assert not workspace[:COUNTER_BYTES].any()
    spread = scale[:, :groups].repeat_interleave(128, 1)[:, :n] if in_groups else scale[:, None]
    stored = torch.float8_e4m3fn if dtype == torch.uint8 else dtype
    return wide[:, :n].view(stored).cpu().double() * spread.cpu().double()


@pytest.mark.parametrize("m", [1, 5, 33])
@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
def test_fp8_blocks_in_and_out(activation: str | None, m: int, device: str) -> None:
    skip_without_fp8("fp8_block", device)
    case = case_of("fp8_block", 200, 512, activation, dtype=torch.float32, bias=True)
    values, scales, x = quantized_rows(case, m)
    got = run(case, values.to(device), scales.to(device), torch.float8_e4m3fn)
    assert_near(got, case.want(x), torch.float8_e4m3fn, True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_other_weights_and_types(dtype: torch.dtype, device: str) -> None:
    for case in (dense_case(136, 64, torch.float32), quant_case("int4", 136, 128, 32, "any", torch.float32, "silu")):
        x = case.rows(3, device)
        assert_near(run(case, x, None, dtype), case.want(x), dtype, True)


@pytest.mark.parametrize("kind", ["w8a8", "fp8"])
def test_a_scale_for_each_row(kind: str, device: str) -> None:
    skip_without_fp8(kind, device)
    dtype = torch.int8 if kind == "w8a8" else torch.float8_e4m3fn
    case = case_of(kind, 200, 256, "silu", dtype=torch.float32)
    for m in (1, 40):
        values, scales, x = quantized_rows(case, m)
        got = run(case, values.to(device), scales.to(device), dtype, in_groups=False)
        assert_near(got, case.want(x), dtype, False)


def test_a_row_has_the_same_bits_alone_and_among_neighbours(device: str) -> None:
    skip_without_fp8("fp8_block", device)
    case = case_of("fp8_block", 128, 1024, "silu", dtype=torch.bfloat16)
    assert case.packed.num_splits > 1
    values, scales, _ = quantized_rows(case, 70)
    values, scales = values.to(device), scales.to(device)
    want = run(case, values[:1], scales[:1], torch.float8_e4m3fn)
    # 70 rows take two launches, and the other tiles are not the product's own: the same bits.
    for m, config in ((2, None), (70, None), (2, LinearConfig(32, 32, 2, 2, split_programs=0))):
        among = run(replace(case, config=config), values[:m], scales[:m], torch.float8_e4m3fn)
        assert torch.equal(among[:1], want), (m, config)


def test_nan_stays_in_its_row(device: str) -> None:
    case = dense_case(128, 64, torch.float16)
    x = case.rows(3, device)
    x[1, 5] = float("nan")
    assert run(case, x, None, torch.int8).isfinite().all(1).tolist() == [True, False, True]


def test_what_does_not_fit_is_refused(device: str) -> None:
    case = dense_case(128, 64, torch.float16)
    x, packed = case.rows(2, device), case.packed.to(device)
    out, scale = torch.zeros(2, 128, dtype=torch.int8, device=device), torch.zeros(2, 1, device=device)
    for wrong in (
        lambda: linear(x, packed, out.half(), out_scale=scale),
        lambda: linear(x, packed, out, out_scale=scale[:1]),
        lambda: linear(x, packed, out),
        lambda: linear(x, packed, out, out_scale=scale[:, 0].contiguous()),  # no workspace
        lambda: linear(x, packed, out, out_scale=scale, residual=out.half()),
    ):
        with pytest.raises(ValueError, match="linear"):
            wrong()
