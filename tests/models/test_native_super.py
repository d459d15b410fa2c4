"""A whole model in Q4_K, Q5_K and Q6_K: the native executor computes what the torch executor does, with the same bits
on every instruction set and however a prompt is cut, and a file of packed weights keeps it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from headrace.kernels.native import library
from headrace.kernels.native.executor import NativeExecutor, PackedWeights, pack
from headrace.kernels.native.fuse import fuse, lower
from headrace.kernels.native.ops import NativeProgram, form_of, pack_specs
from headrace.kernels.native.packed import Origin, PackWriter
from headrace.kernels.quant import QuantTensor, TwoLevel, pack_int4
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.stepping import logits_in_chunks

BLOCK = 16
PROMPT = list(range(3, 40))


def quantised(dense: np.ndarray, type_name: str) -> QuantTensor:
    """Weights to the nearest of a K type, in a simple way: d and dmin fit the largest scale and min of a row."""
    rows, cols = dense.shape
    group = 16 if type_name == "Q6_K" else 32
    x = dense.reshape(rows, cols // group, group).astype(np.float32)
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 31}[type_name]
    low = np.zeros_like(x[..., 0]) if type_name == "Q6_K" else np.maximum(-x.min(2), 0)
    wanted = np.abs(x).max(2) / 31 if type_name == "Q6_K" else (x.max(2) + low) / levels
    most = 127 if type_name == "Q6_K" else 63

    def two_levels(numbers: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        per_super = numbers.reshape(rows, cols // 256, -1)
        d = (per_super.max(2) / most + 1e-6).astype(np.float16)
        return d, np.rint(per_super / d.astype(np.float32)[..., None]).clip(0, most).reshape(numbers.shape)

    d, sub_scales = two_levels(wanted, most)
    scales = np.repeat(d.astype(np.float32), 256 // group, 1) * sub_scales.astype(np.float32)
    safe = np.where(scales == 0, 1, scales)[..., None]
    if type_name == "Q6_K":
        q = np.rint(x / safe).clip(-32, 31).astype(np.int8).reshape(rows, cols)
        return QuantTensor("int8", q, scales, None, 16, TwoLevel(d, None, sub_scales.astype(np.int8), None))
    dmin, sub_mins = two_levels(low, 63)
    zeros = -(np.repeat(dmin.astype(np.float32), 8, 1) * sub_mins.astype(np.float32))
    q = np.rint((x - zeros[..., None]) / safe).clip(0, levels).astype(np.uint8).reshape(rows, cols)
    two = TwoLevel(d, dmin, sub_scales.astype(np.uint8), sub_mins.astype(np.uint8))
    if type_name == "Q4_K":
        return QuantTensor("int4", pack_int4(q), scales, zeros, 32, two)
    return QuantTensor("int8", q.view(np.int8), scales, zeros, 32, two)


def type_of(name: str) -> str:
    """As in Q4_K_M files, where some v, down and the embeddings have 6 bits; the output projections get 5."""
    if name in ("blk.1.attn_v.weight", "blk.0.ffn_down.weight", "token_embd.weight", "output.weight"):
        return "Q6_K"
    return "Q5_K" if "attn_output" in name else "Q4_K"


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> LoadedModel:
    given = load_model(tiny_models.gguf("llama", "F32"))
    weights = dict(given.weights)
    for name, weight in weights.items():
        if len(weight.shape) == 2:
            assert weight.shape[1] % 256 == 0
            weights[name] = quantised(np.asarray(weight), type_of(name))
    return replace(given, weights=weights)


def packed(model: LoadedModel, bits: int, is_fused: bool = True) -> tuple[NativeProgram, PackedWeights]:
    forms = {name: form_of(weight) for name, weight in model.weights.items() if len(weight.shape) == 2}
    make = fuse if is_fused else lower
    program = make(model.program, forms, activation_bits=bits)  # type: ignore[arg-type]
    return program, pack(program, forms, model.weights)


def logits(program: NativeProgram, weights: PackedWeights, chunk: int = 64, num_threads: int = 2) -> np.ndarray:
    executor = NativeExecutor.of_native(
        program, weights, num_blocks=4, block_size=BLOCK, kv_kind=0, num_threads=num_threads
    )
    try:
        return logits_in_chunks(executor, PROMPT, chunk, [2, 0, 1], BLOCK)  # type: ignore[arg-type]
    finally:
        executor.close()


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-3), (8, 5e-2)])
def test_it_computes_what_the_torch_executor_does(model: LoadedModel, bits: int, tolerance: float) -> None:
    torch_executor = TorchExecutor(model.program, model.weights, num_blocks=4, block_size=BLOCK)
    want = logits_in_chunks(torch_executor, PROMPT, 64, [2, 0, 1], BLOCK)
    program, weights = packed(model, bits)
    kinds = {matrix.spec.kind for matrix in weights.matrices.values()}
    assert kinds == {"super4", "super5", "super6"}
    got = logits(program, weights)
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("bits", [8, 16])
def test_the_same_bits_fused_or_not_in_chunks_with_any_threads_on_every_instruction_set(
    model: LoadedModel, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, weights = packed(model, bits)
    want = logits(program, weights)
    np.testing.assert_array_equal(logits(*packed(model, bits, is_fused=False)), want)
    for chunk in (1, 5, 9):
        np.testing.assert_array_equal(logits(program, weights, chunk, num_threads=1 + chunk % 3), want)
    for isa in library.info().usable:
        monkeypatch.setenv(library.ISA_VARIABLE, isa)
        np.testing.assert_array_equal(logits(program, weights), want, isa)


def test_a_file_of_packed_weights_keeps_them(model: LoadedModel, tmp_path: Path) -> None:
    program, weights = packed(model, 8)
    names = [spec.name for spec in pack_specs(program)]
    with PackWriter(tmp_path / "x.headrace-pack", [*names, *weights.forms, *weights.vectors]) as writer:
        for name in names:
            writer.add_matrix(name, weights.matrices[name])
        for name, vector in weights.vectors.items():
            writer.add_vector(name, np.asarray(vector, np.float32))
        mapped = writer.finish(Origin("rules", "digest", ()), weights.forms)
    assert dict(mapped.forms) == dict(weights.forms)
    assert all(form.is_two_level for form in mapped.forms.values())
    assert {name: matrix.spec for name, matrix in mapped.matrices.items()} == {
        name: weights.matrices[name].spec for name in names
    }
    np.testing.assert_array_equal(logits(program, mapped), logits(program, weights))
