"""The product against float64: every kind, ragged sizes, what is fused; bits that do not depend on the neighbours."""

import pytest
import torch
from headrace.kernels.linear.config import LinearConfig
from headrace.kernels.linear.triton import linear

from tests.gpu.interpreter.sanitizer import traffic
from tests.gpu.numerics.linear_case import Case, dense_case, quant_case

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SMALL = LinearConfig(16, 32, 2, 2)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("zeros", ["any", "centre"])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
def test_int4(group: int, zeros: str, dtype: torch.dtype, device: str) -> None:
    quant_case("int4", 70, 3 * max(group, 64), group, zeros, dtype).check(3, device)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize("zeros", ["any", "none"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_int8(group: int, zeros: str, dtype: torch.dtype, device: str) -> None:
    quant_case("int8", 70, 3 * max(group, 64), group, zeros, dtype).check(3, device)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (33, 77), (130, 200)])
def test_dense(rows: int, cols: int, dtype: torch.dtype, device: str) -> None:
    dense_case(rows, cols, dtype).check(3, device)


@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 33, 64, 70])
def test_any_number_of_rows(m: int, device: str) -> None:
    quant_case("int4", 40, 160, 32, "any", HALF, norm=True, residual=True).check(m, device)
    dense_case(40, 150, BRAIN, norm=True, residual=True).check(m, device)


@pytest.mark.parametrize("rows", [1, 7, 8, 31, 65, 129])
def test_any_number_of_columns(rows: int, device: str) -> None:
    quant_case("int4", rows, 192, 32, "any", HALF, bias=True).check(2, device)
    quant_case("int8", rows, 192, 32, "none", HALF, activation="silu", bias=True).check(2, device)
    dense_case(rows, 70, HALF, activation="gelu_tanh", bias=True).check(2, device)


@pytest.mark.parametrize("activation", [None, "silu", "gelu_tanh"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_all_that_is_fused(norm: bool, bias: bool, residual: bool, activation: str | None, device: str) -> None:
    fused = {"norm": norm, "bias": bias, "residual": residual}
    quant_case("int4", 48, 256, 32, "any", HALF, activation, **fused).check(5, device)
    dense_case(48, 96, HALF, activation, **fused).check(5, device)


def test_the_residual_may_be_the_output(device: str) -> None:
    case = quant_case("int4", 64, 512, 32, "any", HALF, residual=True)
    assert case.packed.num_splits > 1
    x = case.rows(4, device)
    kept = case.residual_of(4, device)
    out, workspace = kept.clone(), torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    linear(x, case.packed.to(device), out, residual=out, workspace=workspace)
    assert torch.equal(out, case.run(x, residual=kept))


def test_float32_logits_of_half_rows(device: str) -> None:
    case = quant_case("int8", 70, 128, 32, "none", BRAIN)
    x = case.rows(3, device)
    out = torch.full((3, 70), float("nan"), dtype=SINGLE, device=device)
    linear(x, case.packed.to(device), out, workspace=torch.zeros(1 << 20, dtype=torch.uint8, device=device))
    assert float((out.double().cpu() - case.want(x)).norm() / case.want(x).norm()) < 1e-5


def test_neighbours_that_are_not_finite_stay_alone(device: str) -> None:
    case = quant_case("int4", 64, 256, 32, "any", HALF, norm=True)
    x = case.rows(5, device)
    want = case.run(x)
    x[2] = float("nan")
    x[4] = float("inf")
    got = case.run(x)
    assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])
    assert got[2].isnan().all()


INVARIANT = {  # float32 outputs show every bit of the sums, others what is left of it
    "int4 single": lambda: quant_case("int4", 64, 512, 32, "any", SINGLE, norm=True),
    "dense single": lambda: dense_case(96, 500, SINGLE, norm=True),
    "int4": lambda: quant_case("int4", 96, 768, 32, "any", HALF, norm=True, bias=True),
    "int4 gated": lambda: quant_case("int4", 48, 512, 128, "centre", BRAIN, "silu", norm=True),
    "int8": lambda: quant_case("int8", 96, 384, 16, "any", BRAIN, residual=True),
    "dense": lambda: dense_case(96, 500, HALF, norm=True),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_a_row_has_the_same_bits_alone_and_among_neighbours(name: str, device: str) -> None:
    case = INVARIANT[name]()
    assert case.packed.num_splits > 1
    x = case.rows(65, device)
    residual = case.residual_of(65, device) if case.residual else None

    def run(m: int) -> torch.Tensor:
        return case.run(x[:m], residual=None if residual is None else residual[:m])

    alone = run(1)
    for m in (2, 8, 65):
        assert torch.equal(run(m)[:1], alone), m


@pytest.mark.parametrize(
    "config",
    [
        LinearConfig(16, 16, 1, 2),
        LinearConfig(32, 64, 4, 2, group_n=1),
        LinearConfig(64, 128, 4, 2, split_programs=0),
        LinearConfig(128, 32, 4, 2),
    ],
)
@pytest.mark.parametrize("name", INVARIANT)
def test_block_sizes_do_not_change_bits(name: str, config: LinearConfig, device: str) -> None:
    case = INVARIANT[name]()
    x = case.rows(20, device)
    got = Case(**{**vars(case), "config": config}).run(x)
    assert torch.equal(got, case.run(x))


@pytest.mark.parametrize("rows", [64, 130, 192])
def test_tiles_wider_than_those_stored(rows: int, device: str) -> None:
    quant_case("int8", rows, 128, 32, "none", HALF, config=LinearConfig(16, 128, 4, 2)).check(2, device)


def test_weights_are_read_once(device: str) -> None:
    if device != "cpu":
        pytest.skip("only the interpreter counts bytes")  # a GPU does not tell what a program asked for
    for case, argument in (
        (quant_case("int4", 128, 512, 32, "any", HALF, norm=True), "words"),
        (quant_case("int8", 128, 512, 32, "none", HALF), "words"),
        (dense_case(128, 512, HALF), "weight"),
    ):
        with traffic() as counts:
            case.run(case.rows(16, device))
        moved = [count for (_, name, kind), count in counts.items() if (name, kind) == (argument, "load")]
        assert sum(count.requested for count in moved) <= 1.05 * sum(count.unique for count in moved)
        assert sum(count.requested for count in moved) > 0


BAD = [
    ({"x": torch.zeros(2, 65, dtype=HALF)}, r"want \[M, 64\]"),
    ({"x": torch.zeros(2, 64, dtype=BRAIN)}, "float16"),
    ({"x": torch.zeros(64, 2, dtype=HALF).T}, "dense along a row"),
    ({"out": torch.zeros(2, 31, dtype=HALF)}, r"want \[2, 32\]"),
    ({"out": torch.zeros(2, 32, dtype=torch.int8)}, "float type"),
    ({"bias": torch.zeros(31)}, "bias"),
    ({"residual": torch.zeros(1, 32, dtype=HALF)}, "residual"),
    ({"norm": (torch.zeros(32), 1e-5)}, "norm"),
    ({"activation": "silu"}, "is_gated = False"),
    ({"x_scale": torch.zeros(2)}, "x_scale"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_wrong_arguments_are_named(change: dict[str, object], message: str, device: str) -> None:
    case = quant_case("int4", 32, 64, 32, "any", HALF)
    arguments = {"x": torch.zeros(2, 64, dtype=HALF), "out": torch.zeros(2, 32, dtype=HALF), **change}
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    with pytest.raises(ValueError, match=message):
        linear(weight=case.packed.to(device), **arguments)  # type: ignore[arg-type]


def test_a_workspace_too_small_is_named(device: str) -> None:
    case = quant_case("int4", 64, 512, 32, "any", HALF)
    x = case.rows(2, device)
    with pytest.raises(ValueError, match=r"workspace of \d+ bytes"):
        linear(x, case.packed.to(device), torch.empty(2, 64, dtype=HALF, device=device))
