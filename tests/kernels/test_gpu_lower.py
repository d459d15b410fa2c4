"""The lowering to the GPU's fused ops: after every rewrite the program means the same, and few launches are left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from headrace.kernels.gpu import lower as lowering
from headrace.kernels.gpu.lower import LowerOptions, lower, num_launches, translate
from headrace.kernels.gpu.ops import (
    Attention,
    Embed,
    GpuProgram,
    Norm,
    Product,
    QuantizeGated,
    QuantizeRows,
    RopeKv,
    WeightForm,
    describe,
    form_of,
    pack_specs,
)
from headrace.kernels.gpu.quantization import KINDS, problem_of, quantized_forms
from headrace.kernels.program import Add, GatedActivation, SelectRows
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.gpu_meaning import expand
from tests.support.stepping import step_batch

ARCHITECTURES = ("llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3", "gemma3-capped")
BLOCK = 4


def forms_of(model: LoadedModel) -> dict[str, WeightForm]:
    return {spec.name: form_of(model.weights[spec.name]) for spec in model.program.weights if len(spec.shape) == 2}


def logits(model: LoadedModel, program: GpuProgram | None) -> np.ndarray:
    """A prefill chunk and a decode row, twice; logits of some rows only."""
    step_program = model.program if program is None else expand(program, model.program)
    executor = TorchExecutor(step_program, model.weights, num_blocks=16, block_size=BLOCK)
    results = []
    for start in (0, 5):
        pieces = [([7, 11, 3, 99, 5], start, [2, 5, 3]), ([42 + start], start // 5, [4])]
        batch = step_batch(pieces, BLOCK)
        results.append(executor.forward(replace(batch, logit_rows=np.array([1, 4, 5], np.int32))))
    return np.concatenate(results)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_rewrite_keeps_the_meaning(tiny_models: TinyModels, architecture: str) -> None:
    model = load_model(tiny_models.gguf(architecture, "Q8_0"))
    forms, want = forms_of(model), logits(model, None)
    program = translate(model.program)
    np.testing.assert_allclose(logits(model, program), want, rtol=1e-5, atol=1e-5)
    for rewrite in lowering.REWRITES:
        changed = rewrite(program, forms, LowerOptions())
        np.testing.assert_allclose(logits(model, changed), want, rtol=1e-4, atol=1e-4, err_msg=rewrite.__name__)
        program = changed
    assert program == lower(model.program, forms)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_fusions_that_are_switched_off_leave_ops_of_their_own(tiny_models: TinyModels, architecture: str) -> None:
    model = load_model(tiny_models.gguf(architecture))
    options = LowerOptions(has_norm_prologue=False, has_rope_epilogue=False)
    program = lower(model.program, forms_of(model), options)
    kinds = [type(op) for op in program.ops]
    assert kinds.count(RopeKv) == len(program.kv)
    assert kinds.count(Norm) >= 2 * len(program.kv) + 1
    assert not any(isinstance(op, Product) and (op.norm or op.rope_kv) for op in program.ops)
    np.testing.assert_allclose(logits(model, program), logits(model, None), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_layer_takes_six_launches(tiny_models: TinyModels, architecture: str) -> None:
    model = load_model(tiny_models.gguf(architecture))
    program = lower(model.program, forms_of(model))
    layers = len(program.kv)
    assert [num_launches(program, layer) for layer in range(layers - 1)] == [6] * (layers - 1)
    assert num_launches(program, layers - 1) == 6 + 2  # the gather of rows and the output head
    assert not any(isinstance(op, (Norm, RopeKv, Add, GatedActivation)) for op in program.ops), [
        *map(describe, program.ops)
    ]


def test_weights_of_different_forms_are_not_joined(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.gguf("llama", "Q8_0"))
    forms = forms_of(model) | {"blk.1.attn_v.weight": WeightForm("dense"), "blk.1.ffn_up.weight": WeightForm("dense")}
    program = lower(model.program, forms)
    np.testing.assert_allclose(logits(model, program), logits(model, None), rtol=1e-4, atol=1e-4)
    sources = {spec.sources for spec in pack_specs(program)}
    assert ("blk.1.attn_q.weight", "blk.1.attn_k.weight") in sources
    assert ("blk.1.attn_v.weight",) in sources
    assert ("blk.1.ffn_gate.weight",) in sources
    assert ("blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight") in sources
    assert [op.layer for op in program.ops if isinstance(op, RopeKv)] == [1]  # its product writes q and k alone


def test_head_dims_that_are_no_power_of_two_turn_by_themselves(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.gguf("llama"))
    program = translate(model.program)
    odd = replace(program, ops=tuple(replace(op, head_dim=96) if isinstance(op, RopeKv) else op for op in program.ops))
    for rewrite in lowering.REWRITES:
        odd = rewrite(odd, forms_of(model), LowerOptions())
    assert len([op for op in odd.ops if isinstance(op, RopeKv)]) == len(program.kv)
    assert not any(isinstance(op, Product) and op.rope_kv for op in odd.ops)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_only_wanted_rows_go_through_the_last_mlp(tiny_models: TinyModels, architecture: str) -> None:
    model = load_model(tiny_models.gguf(architecture))
    program = lower(model.program, forms_of(model))
    kinds = [type(op) for op in program.ops]
    select = kinds.index(SelectRows)
    last_attention = max(i for i, kind in enumerate(kinds) if kind is Attention)
    assert last_attention < select
    gated = [i for i, op in enumerate(program.ops) if isinstance(op, Product) and op.activation]
    assert [i > select for i in gated] == [False] * (len(gated) - 1) + [True]
    rows = {buffer.name: buffer.rows for buffer in program.buffers}
    last = program.ops[gated[-1]]
    assert isinstance(last, Product)
    assert rows[last.x] == rows[last.out] == "logits"


def test_only_what_is_used_is_packed_and_kept(tiny_models: TinyModels) -> None:
    model = load_model(tiny_models.gguf("llama"))
    program = lower(model.program, forms_of(model))
    assert sum(len(spec.sources) for spec in pack_specs(program)) == len(forms_of(model))
    names = {name for op in program.ops if isinstance(op, Embed) for name in (op.out,)}
    assert names <= {buffer.name for buffer in program.buffers}
    assert "gate" not in {buffer.name for buffer in program.buffers}  # the fused product never stores it


@pytest.mark.parametrize("quantization", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3-capped"])
def test_inputs_of_8_bits_keep_the_meaning(tiny_models: TinyModels, architecture: str, quantization: str) -> None:
    model = load_model(tiny_models.gguf(architecture, "Q8_0"))
    forms = quantized_forms(model.program, forms_of(model), quantization)
    for options in (LowerOptions(), LowerOptions(has_norm_prologue=False)):
        program = lower(model.program, forms, options)
        np.testing.assert_allclose(logits(model, program), logits(model, None), rtol=1e-4, atol=1e-4)
        quantized = {spec.name for spec in program.matrices if spec.quantized}
        products = [op for op in program.ops if isinstance(op, Product)]
        assert all((op.x_scale is not None) == (op.matrix in quantized) for op in products)
        assert not any(op.norm for op in products if op.matrix in quantized)
        assert {op.matrix for op in products if op.out == program.logits}.isdisjoint(quantized)


def test_norms_and_gates_quantise_what_they_write(tiny_models: TinyModels) -> None:
    """Two launches a layer do nothing else: before the output product, and before down where gate and up are one; in
    blocks of 128 their product does it."""
    model = load_model(tiny_models.gguf("llama"))
    layers = len(model.program.kv)
    apart = {f"blk.{layer}.ffn_up.weight": WeightForm("w8a8") for layer in range(layers)}
    for quantization, other, rows, gated in (("int8", {}, 2, 0), ("fp8-block", {}, 1, 0), ("fp8", apart, 1, 1)):
        forms = quantized_forms(model.program, forms_of(model), quantization) | other
        program = lower(model.program, forms)
        np.testing.assert_allclose(logits(model, program), logits(model, None), rtol=1e-4, atol=1e-4)
        kinds = [type(op) for op in program.ops]
        assert (kinds.count(QuantizeRows), kinds.count(QuantizeGated)) == (rows * layers, gated * layers)
        norms = [op for op in program.ops if isinstance(op, Norm)]
        assert len(norms) == (3 if other else 2) * layers  # in each of the two types
        assert all(norm.out_scale for norm in norms)
        assert GatedActivation not in kinds


def test_rows_in_8_bits_are_used_again_until_they_change(tiny_models: TinyModels) -> None:
    """Two products of one input that could not be joined: it is quantised once."""
    model = load_model(tiny_models.gguf("qwen2"))  # 96 columns: blocks of 128 rows would span q and k
    program = lower(model.program, quantized_forms(model.program, forms_of(model), "fp8-block"))
    first = next(i for i, op in enumerate(program.ops) if isinstance(op, Norm))
    kinds = [type(op) for op in program.ops[first : first + 5]]
    assert kinds == [Norm, Product, Product, Product, RopeKv]


def test_fp8_is_refused_where_it_cannot_be_multiplied() -> None:
    assert "8.9" in problem_of("fp8-block", (8, 6), "A10")
    assert "int8" in problem_of("fp8", (8, 0), "A100")
    for fine in (("fp8", (8, 9)), ("fp8", None), ("int8", (8, 0)), ("none", (8, 0))):
        assert problem_of(fine[0], fine[1], "GPU") == ""


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_products_prepare_the_norm_that_comes_next(tiny_models: TinyModels, architecture: str) -> None:
    """Only two norms are left to those who read them: after the embedding, and after rows were gathered."""
    model = load_model(tiny_models.gguf(architecture))
    program = lower(model.program, forms_of(model))
    products = [op for op in program.ops if isinstance(op, Product)]
    assert sum(op.norm is not None for op in products) == 2
    assert sum(op.squares is not None for op in products) == 2 * len(program.kv) - 1  # the output head is one
    assert sum(op.next_norm is not None for op in products) == 2 * len(program.kv) - 1
    kept = lower(model.program, forms_of(model), LowerOptions(has_next_norm=False))
    assert not any(isinstance(op, Product) and (op.next_norm or op.squares) for op in kept.ops)
    np.testing.assert_allclose(logits(model, kept), logits(model, None), rtol=1e-4, atol=1e-4)


def test_a_norm_of_what_has_changed_is_not_prepared(tiny_models: TinyModels) -> None:
    """Gemma norms a product before it is added: what the next norm sees is the sum."""
    model = load_model(tiny_models.gguf("gemma3"))
    program = lower(model.program, forms_of(model))
    assert not any(isinstance(op, Product) and op.next_norm for op in program.ops)
    assert sum(isinstance(op, Product) and op.norm is not None for op in program.ops) == 2 * len(program.kv) + 1
