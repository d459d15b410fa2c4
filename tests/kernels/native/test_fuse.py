"""The rewrites of the native program: each means the same to the bit, and each leaves alone what it does not fit.

The program before and after a rewrite runs on the native executor; the lowered program, nothing fused, is held to the
torch executor in tests/models/test_native.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
from headrace.kernels.native.executor import NativeExecutor, pack
from headrace.kernels.native.fuse import REWRITES, fuse, lower, merge_products, quantize_once
from headrace.kernels.native.fuse_rows import select_rows_early
from headrace.kernels.native.ops import (
    Attention,
    MatMul,
    NativeOp,
    NativeProgram,
    Norm,
    Quantize,
    RopeKv,
    WeightForm,
    form_of,
    pack_specs,
)
from headrace.kernels.program import (
    Add,
    Buffer,
    Embed,
    GatedActivation,
    KvLayout,
    Linear,
    PagedAttention,
    RmsNorm,
    SelectRows,
    StepProgram,
    WeightSpec,
)
from headrace.kernels.quant import QuantTensor
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.stepping import step_batch
from tests.support.tiny_models import ARCHITECTURES

BLOCK = 16
FIRST = step_batch([(list(range(3, 40)), 0, [2, 5, 1]), ([7, 7, 7], 0, [3])], BLOCK)
SECOND = step_batch([([9], 37, [2, 5, 1]), ([8, 6], 3, [3]), ([50], 0, [0])], BLOCK)
CASES = [(architecture, "Q4_1") for architecture in ARCHITECTURES] + [("llama", "F32"), ("gemma3", "Q8_0")]


@dataclass(frozen=True, eq=False)
class Case:
    model: LoadedModel
    forms: dict[str, WeightForm]

    def logits(self, program: NativeProgram) -> np.ndarray:
        packed = pack(program, self.forms, self.model.weights)
        executor = NativeExecutor.of_native(program, packed, num_blocks=6, block_size=BLOCK, kv_kind=1, num_threads=2)
        try:
            return np.concatenate([executor.forward(FIRST), executor.forward(SECOND)])
        finally:
            executor.close()


@pytest.fixture(scope="module")
def case(tiny_models: TinyModels) -> Callable[[str, str], Case]:
    @functools.cache
    def make(architecture: str, quantization: str) -> Case:
        model = load_model(tiny_models.gguf(architecture, quantization))
        return Case(model, {name: form_of(w) for name, w in model.weights.items() if len(w.shape) == 2})

    return make


@pytest.mark.parametrize(("architecture", "quantization"), CASES)
def test_every_rewrite_gives_the_same_bits(
    architecture: str, quantization: str, case: Callable[[str, str], Case]
) -> None:
    given = case(architecture, quantization)
    program = lower(given.model.program, given.forms)
    want = given.logits(program)
    assert np.isfinite(want).all()
    for rewrite in REWRITES:
        program = rewrite(program, given.forms)
    assert any(isinstance(op, Norm) and op.selects_rows for op in program.ops)
    np.testing.assert_array_equal(given.logits(program), want, err_msg="rows selected late")
    program = lower(select_rows_early(given.model.program), given.forms)
    np.testing.assert_array_equal(given.logits(program), want, err_msg="select_rows_early")
    for rewrite in REWRITES:
        rewritten = rewrite(program, given.forms)
        if rewritten != program:
            np.testing.assert_array_equal(given.logits(rewritten), want, err_msg=rewrite.__name__)
        program = rewritten
    assert program == fuse(given.model.program, given.forms)


def kinds(ops: Sequence[NativeOp]) -> list[str]:
    return [type(op).__name__ for op in ops]


def test_a_llama_layer_is_eight_ops(case: Callable[[str, str], Case]) -> None:
    given = case("llama", "Q4_1")
    program = fuse(given.model.program, given.forms)
    layer = ["Norm", "MatMul", "RopeKv", "Attention", "MatMul", "Norm", "MatMul", "MatMul"]
    last = [*layer[:4], "SelectRows", "SelectRows", "Quantize", *layer[4:]]
    assert kinds(program.ops) == ["Embed", *layer * 2, *last, "Norm", "MatMul"]
    qkv, out, gate, down, head = (op for op in (*program.ops[1:9], program.ops[-1]) if isinstance(op, MatMul))
    assert [spec.sources for spec in program.matrices if spec.name == qkv.matrix] == [
        ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight")
    ]
    assert [op.epilogue for op in (qkv, out, gate, down, head)] == ["store", "add", "silu_gate", "add", "store"]
    bits = {buffer.name: buffer.bits for buffer in program.quant_buffers}
    assert [bits[op.x] for op in (qkv, out, gate, down, head)] == [8, 8, 8, 8, 16]
    assert {spec.name for spec in pack_specs(program)} == {op.matrix for op in program.ops if isinstance(op, MatMul)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_wanted_rows_pass_the_last_layers_products(architecture: str, case: Callable[[str, str], Case]) -> None:
    program = case(architecture, "Q4_1").model.program
    rows = {buffer.name: buffer.rows for buffer in program.buffers}
    moved = select_rows_early(program)
    moved_rows = {buffer.name: buffer.rows for buffer in moved.buffers}
    linears = [[op for op in p.ops if isinstance(op, Linear)] for p in (program, moved)]
    assert [op.weight for op in linears[0]] == [op.weight for op in linears[1]]
    assert [rows[op.out] for op in linears[0][-5:]] == ["tokens"] * 4 + ["logits"]
    assert [moved_rows[op.out] for op in linears[1][-5:]] == ["logits"] * 5  # o, gate, up, down, head
    assert {moved_rows[op.out] for op in linears[1][:-5]} == {"tokens"}


def test_qk_norms_join_the_rotation(case: Callable[[str, str], Case]) -> None:
    given = case("qwen3", "Q4_1")
    ropes = [op for op in fuse(given.model.program, given.forms).ops if isinstance(op, RopeKv)]
    assert len(ropes) == len(given.model.program.kv)
    assert all(op.q_norm and op.k_norm and op.q and op.k for op in ropes)


def test_sandwich_norms_keep_their_adds(case: Callable[[str, str], Case]) -> None:
    given = case("gemma3", "Q4_1")
    program = fuse(given.model.program, given.forms)
    assert kinds(program.ops).count("Add") == 2 * len(given.model.program.kv)
    assert {op.epilogue for op in program.ops if isinstance(op, MatMul)} == {"store", "gelu_gate"}


def test_narrow_heads_are_quantised_apart_from_their_attention(case: Callable[[str, str], Case]) -> None:
    """A group of 32 features would hold the results of two threads."""
    given = case("llama3", "Q4_1")  # heads of 16
    program = fuse(given.model.program, given.forms)
    assert all(op.quantized is None for op in program.ops if isinstance(op, Attention))
    assert sum(isinstance(op, Quantize) and op.x in ("attn", "attn.chosen") for op in program.ops) == len(
        given.model.program.kv
    )


@pytest.mark.parametrize("bits", [8, 16])
def test_activation_bits_leave_the_head_alone(bits: int, case: Callable[[str, str], Case]) -> None:
    given = case("llama", "Q4_1")
    program = fuse(given.model.program, given.forms, activation_bits=bits)  # type: ignore[arg-type]
    bits_of = {buffer.name: buffer.bits for buffer in program.quant_buffers}
    *products, head = (op for op in program.ops if isinstance(op, MatMul))
    assert {bits_of[op.x] for op in products} == {bits}
    assert bits_of[head.x] == 16


def test_unknown_precisions_are_refused(case: Callable[[str, str], Case]) -> None:
    given = case("llama", "Q4_1")
    with pytest.raises(ValueError, match="8 or 16 bits, not 4"):
        fuse(given.model.program, given.forms, activation_bits=4)  # type: ignore[arg-type]


# ---- What fits no pattern: small programs made by hand, 64 wide, run before and after all rewrites ----

WIDTH, VOCAB = 64, 48
TOKENS = ("x", "h", "a", "b", "c")


def run_by_hand(ops: list[object], forms: dict[str, WeightForm] | None = None) -> NativeProgram:
    """Lower, fuse, run both, compare bits; the fused program. Every weight is a random float32 matrix or vector."""
    rng = np.random.default_rng(5)
    body = (Embed("x", "table", 1.0), *ops, SelectRows("last", "x"), Linear("logits", "last", "table"))
    names = {name for op in body for name in vars(op).values() if isinstance(name, str)}
    matrices = [WeightSpec(name, (WIDTH, WIDTH)) for name in sorted(names) if name.startswith("w")]
    program = StepProgram(
        buffers=(
            *(Buffer(name, "tokens", WIDTH) for name in TOKENS),
            Buffer("last", "logits", WIDTH),
            Buffer("logits", "logits", VOCAB),
        ),
        ops=body,  # type: ignore[arg-type]
        weights=(WeightSpec("table", (VOCAB, WIDTH)), *matrices, WeightSpec("norm", (WIDTH,))),
        kv=(KvLayout(1, 16),),
        vocab_size=VOCAB,
    )
    weights = {spec.name: rng.standard_normal(spec.shape).astype(np.float32) * 0.1 for spec in program.weights}
    forms = forms or {spec.name: form_of(weights[spec.name]) for spec in program.weights if len(spec.shape) == 2}
    batch = step_batch([([1, 2, 3, 4, 5], 0, [0])], BLOCK)
    results = []
    for native in (lower(program, forms), fuse(program, forms)):
        executor = NativeExecutor.of_native(native, pack(native, forms, weights), num_blocks=2, block_size=BLOCK)
        results.append(executor.forward(batch))
        executor.close()
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(results[0], results[1])
    return fuse(program, forms)


def test_a_product_that_is_read_again_is_not_added_away() -> None:
    norm = RmsNorm("a", "x", "norm", 1e-5, WIDTH)
    program = run_by_hand([norm, Linear("h", "a", "w1"), Add("x", "x", "h"), Add("x", "x", "h")])
    assert kinds(program.ops)[1:5] == ["Norm", "MatMul", "Add", "Add"]


def test_a_product_is_not_added_into_its_own_input() -> None:
    program = run_by_hand([Linear("h", "x", "w1"), Add("x", "x", "h")])
    assert kinds(program.ops)[1:3] == ["MatMul", "Add"]


def test_a_gate_that_is_read_again_stays() -> None:
    ops = [Linear("a", "x", "w1"), Linear("b", "x", "w2"), GatedActivation("h", "a", "b", "silu"), Add("x", "h", "a")]
    assert "GatedActivation" in kinds(run_by_hand(ops).ops)


def test_swapped_gates_stay() -> None:
    ops = [Linear("a", "x", "w1"), Linear("b", "x", "w2"), GatedActivation("h", "b", "a", "silu"), Add("x", "x", "h")]
    assert "GatedActivation" in kinds(run_by_hand(ops).ops)


def test_products_of_different_inputs_are_not_merged() -> None:
    program = run_by_hand(
        [RmsNorm("h", "x", "norm", 1e-5, WIDTH), Linear("a", "x", "w1"), Linear("b", "h", "w2"), Add("x", "a", "b")]
    )
    assert all(len(spec.sources) == 1 for spec in pack_specs(program))


def test_a_product_of_the_output_of_another_is_not_merged() -> None:
    program = run_by_hand([Linear("a", "x", "w1"), Linear("x", "a", "w2")])
    assert all(len(spec.sources) == 1 for spec in pack_specs(program))


def test_rows_are_not_selected_before_the_last_attention() -> None:
    """Of programs without attention, and of those that read all rows again later, nothing moves."""
    ops = (Embed("x", "t", 1.0), Linear("x", "x", "w1"), SelectRows("last", "x"), Linear("logits", "last", "t"))
    buffers = (Buffer("x", "tokens", 8), Buffer("last", "logits", 8), Buffer("logits", "logits", 8))
    program = StepProgram(buffers, ops, (), (KvLayout(1, 8),), 8)
    assert select_rows_early(program) == program
    attention = PagedAttention("x", "x", 0, 1, 1, 8, 1.0)
    again = replace(program, ops=(ops[0], attention, *ops[1:3], Linear("x", "x", "w2"), ops[3]))
    assert select_rows_early(again) == again
    assert select_rows_early(replace(program, ops=(ops[0], attention, *ops[1:]))).ops == (
        ops[0],
        attention,
        SelectRows("x.chosen", "x"),
        Linear("x.chosen", "x.chosen", "w1"),
        Linear("logits", "x.chosen", "t"),
    )


def test_selected_rows_that_no_norm_reads_stay() -> None:
    assert "SelectRows" in kinds(run_by_hand([]).ops)


@pytest.mark.parametrize("kind", ["int8", "dense"])
def test_products_whose_weights_differ_in_form_write_their_own_columns(
    kind: str, case: Callable[[str, str], Case]
) -> None:
    """As in Q4_K_M files, where half of the v matrices are wider."""
    given = case("llama", "Q4_1")
    name = "blk.1.attn_v.weight"
    dense = given.model.weights[name].dequantize()  # type: ignore[union-attr]
    weight = dense if kind == "dense" else to_int8(dense)
    mixed = Case(
        replace(given.model, weights={**given.model.weights, name: weight}), given.forms | {name: form_of(weight)}
    )
    program = fuse(mixed.model.program, mixed.forms)
    np.testing.assert_array_equal(mixed.logits(program), mixed.logits(lower(mixed.model.program, mixed.forms)))
    written = [op.out for op in program.ops if isinstance(op, MatMul) and op.x in ("h", "h.a8") and op.out]
    assert written == ["q+k+v", "q+k", "v", "q+k+v"]
    norm = next(op for op in program.ops if isinstance(op, Norm) and op.weight == "blk.1.attn_norm.weight")
    assert norm.quantized == "h.a8"
    assert norm.out == ("h" if kind == "dense" else None)  # a dense product wants it as it is


def to_int8(dense: np.ndarray) -> QuantTensor:
    rows, cols = dense.shape
    groups = dense.reshape(rows, cols // 32, 32)
    scales = (np.abs(groups).max(2) / 127).astype(np.float32)
    packed = np.rint(groups / scales[:, :, None]).astype(np.int8).reshape(rows, cols)
    return QuantTensor("int8", packed, scales, None, 32)


def test_an_input_is_quantised_once(case: Callable[[str, str], Case]) -> None:
    given = case("llama", "Q4_1")
    program = quantize_once(lower(given.model.program, given.forms), given.forms)
    assert kinds(program.ops).count("Quantize") == 4 * 3 + 1  # h, attn, h, act of each layer, and the head's


def test_merging_twice_changes_nothing(case: Callable[[str, str], Case]) -> None:
    given = case("llama", "Q4_1")
    once = merge_products(quantize_once(lower(given.model.program, given.forms), given.forms), given.forms)
    assert merge_products(once, given.forms) == once
