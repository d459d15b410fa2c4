"""What the native executor refuses before anything runs: batches, programs, weights and numbers that do not fit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.native import encode as encoding
from headrace.kernels.native import executor as executor_module
from headrace.kernels.native import library
from headrace.kernels.native.encode import encode
from headrace.kernels.native.executor import NativeExecutor, pack
from headrace.kernels.native.fuse import fuse
from headrace.kernels.native.ops import MatMul, NativeProgram, form_of, pack_specs
from headrace.kernels.program import KvLayout
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.stepping import step_batch
from tests.support.tiny_models import VOCAB_SIZE

ROOT = Path(__file__).parents[3]
BLOCK = 4
GOOD = step_batch([([5, 6, 7], 0, [2]), ([8, 9], 0, [4])], BLOCK)


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> LoadedModel:
    return load_model(tiny_models.gguf("llama", "Q4_1"))


def make(model: LoadedModel) -> NativeExecutor:
    return NativeExecutor(
        model.program,
        model.weights,
        num_blocks=12,
        block_size=BLOCK,
        num_threads=2,
        max_num_batched_tokens=16,
        max_logit_rows=8,
    )


@pytest.fixture(scope="module")
def executor(model: LoadedModel) -> NativeExecutor:
    return make(model)


# ---- Batches that do not fit ----


def changed(name: str, index: int | tuple[int, int], value: int) -> StepBatch:
    array = getattr(GOOD, name).copy()
    array[index] = value
    return replace(GOOD, **{name: array})


REFUSED: dict[str, tuple[StepBatch, str]] = {
    "token below": (changed("token_ids", 1, -1), "token -1 is not in the vocabulary"),
    "token above": (changed("token_ids", 4, VOCAB_SIZE), "token 384 is not in the vocabulary"),
    "position": (changed("positions", 2, 3), "row 2 is at position 3, not 2"),
    "slot": (changed("slot_mapping", 0, 9), "row 0 has slot 9, not 8"),
    "slot far out": (changed("slot_mapping", 0, 2**31 - 1), "row 0 has slot"),
    "block below": (changed("block_tables", (1, 0), -1), "there is no block -1"),
    "block above": (changed("block_tables", (0, 0), 12), "there is no block 12"),
    "length above": (changed("seq_lens", 1, 5), "5 tokens do not fit in 1 blocks"),
    "length far out": (changed("seq_lens", 1, 2**31 - 1), "do not fit in 1 blocks"),
    "length below": (changed("seq_lens", 1, 1), "sequence 1 has 2 rows and 1 tokens"),
    "offsets fall": (changed("cu_seqlens_q", 1, 6), "cu_seqlens_q does not ascend"),
    "an empty sequence": (changed("cu_seqlens_q", 1, 0), "cu_seqlens_q does not ascend"),
    "offsets start": (changed("cu_seqlens_q", 0, 1), "cu_seqlens_q runs from 1"),
    "offsets end": (changed("cu_seqlens_q", 2, 4), "cu_seqlens_q runs from 0 to 4"),
    "logit row above": (changed("logit_rows", 4, 5), "logit_rows do not ascend at 4"),
    "logit row twice": (changed("logit_rows", 1, 0), "logit_rows do not ascend at 1"),
    "logit row below": (changed("logit_rows", 0, -1), "logit_rows do not ascend at 0"),
    "too few positions": (replace(GOOD, positions=GOOD.positions[:4]), "want 5 int32"),
    "wide integers": (replace(GOOD, token_ids=GOOD.token_ids.astype(np.int64)), "int64"),
    "gaps": (replace(GOOD, token_ids=np.repeat(GOOD.token_ids, 2)[::2]), "without gaps"),
    "flat tables": (replace(GOOD, block_tables=GOOD.block_tables.ravel()), "want 0 int32"),
    "too little sampling": (replace(GOOD, sampling=GOOD.sampling[:3]), "5 rows of logits, 3 to sample"),
    "a target above": (replace(GOOD, sampling=(RowSampling(target=VOCAB_SIZE),) * 5), "target"),
    "a banned token above": (replace(GOOD, sampling=(RowSampling(banned=(VOCAB_SIZE,)),) * 5), "banned"),
    "nothing": (
        StepBatch(
            *(np.zeros(0, np.int32),) * 3,
            np.zeros(1, np.int32),
            np.zeros(0, np.int32),
            np.zeros((0, 1), np.int32),
            np.zeros(0, np.int32),
            (),
        ),
        "a step of 0 tokens",
    ),
    "too many tokens": (step_batch([(list(range(17)), 0, [0, 1, 2, 3, 4])], BLOCK), "a step of 17 tokens; at most 16"),
    "too many logits": (step_batch([(list(range(9)), 0, [0, 1, 2])], BLOCK), "9 rows of logits; at most 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_batch_that_does_not_fit_is_refused(case: str, executor: NativeExecutor) -> None:
    before = executor.forward(GOOD)
    batch, why = REFUSED[case]
    with pytest.raises(ValueError, match=why):
        executor.execute(batch)
    np.testing.assert_array_equal(executor.forward(GOOD), before)  # nothing has run, and the executor lives on


# ---- Programs and weights that do not fit ----


@pytest.mark.parametrize("fault", ["missing", "misshapen"])
def test_wrong_weights_are_refused_by_name(model: LoadedModel, fault: str) -> None:
    weights = dict(model.weights)
    if fault == "missing":
        del weights["blk.1.ffn_up.weight"]
    else:
        weights["blk.1.ffn_up.weight"] = np.zeros((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight"):
        make(replace(model, weights=weights))


def native_of(model: LoadedModel) -> tuple[NativeProgram, Any]:
    forms = {name: form_of(weight) for name, weight in model.weights.items() if len(weight.shape) == 2}
    program = fuse(model.program, forms)
    return program, pack(program, forms, model.weights)


def open_changed(model: LoadedModel, change: Callable[[NativeProgram], NativeProgram], **options: int) -> None:
    program, packed = native_of(model)
    NativeExecutor.of_native(change(program), packed, num_blocks=4, block_size=BLOCK, **options)


def change_op(index: int, **fields: object) -> Callable[[NativeProgram], NativeProgram]:
    def change(program: NativeProgram) -> NativeProgram:
        ops = list(program.ops)
        ops[index] = replace(ops[index], **fields)  # type: ignore[arg-type]
        return replace(program, ops=tuple(ops))

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (change_op(1, quantized="attn.a8", out="logits"), "has another width"),
        (change_op(1, quantized=None), "there is no output"),
        (change_op(1, group=100), "the groups do not fit"),
        (change_op(2, x="act.a8"), "the input has another width"),
        (change_op(2, x="x"), "not quantised"),
        (change_op(2, epilogue="silu_gate"), "differ in gates"),
        (change_op(2, bias=("output_norm.weight",)), "a vector is missing or of another length"),
        (change_op(3, head_dim=512), "the head is too wide"),
        (change_op(3, k="q"), "k and v do not fit"),
        (change_op(4, num_heads=6), "the heads do not fit"),
        (change_op(4, layer=7), "no such layer"),
        (change_op(4, window=-1), "the window is negative"),
        (change_op(-2, x="x"), "operands differ in rows"),
        (change_op(-2, selects_rows=True), "rows are selected from tokens"),
        (lambda program: replace(program, logits="x"), "the logits are not as wide"),
        (lambda program: replace(program, vocab_size=100), "the logits are not as wide"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(
    change: Callable[[NativeProgram], NativeProgram], why: str, model: LoadedModel
) -> None:
    with pytest.raises(ValueError, match=why):
        open_changed(model, change)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"num_threads": 0}, "0 threads are out of range"),
        ({"max_tokens": 0}, "max_tokens 0 is out of range"),
        ({"max_logit_rows": -1}, "max_logit_rows -1"),
        ({"kv_kind": 4}, "KV kind 4"),
    ],
)
def test_impossible_numbers_are_refused(options: dict[str, int], why: str, model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=why):
        open_changed(model, lambda program: program, **options)


def test_sizes_that_overflow_are_refused(model: LoadedModel) -> None:
    program, packed = native_of(model)
    with pytest.raises(ValueError, match="blocks"):
        NativeExecutor.of_native(program, packed, num_blocks=2**31 - 1, block_size=16)
    wide = replace(program, kv=(KvLayout(num_kv_heads=1 << 16, head_dim=256),) * len(program.kv))
    with pytest.raises(ValueError, match="KV blocks are too many"):
        NativeExecutor.of_native(wide, packed, num_blocks=2**30, block_size=1)


def test_a_matrix_that_is_shorter_than_it_says_is_refused(model: LoadedModel) -> None:
    program, packed = native_of(model)
    structs = {spec.name: packed.matrices[spec.name].struct() for spec in pack_specs(program)}
    name = next(op.matrix for op in program.ops if isinstance(op, MatMul))
    structs[name].data_bytes -= 1
    encoded = encode(program, structs, packed.vectors)
    assert not _create(encoded.config)
    assert "data is cut off" in library.last_error()


def _create(config: encoding.HrExecutorConfig) -> int | None:
    native = library.load()
    for name, value in {"num_blocks": 4, "block_size": 4, "max_tokens": 4, "max_logit_rows": 4}.items():
        setattr(config, name, value)
    config.num_threads = 1
    handle: int | None = native.hr_executor_create(ctypes.byref(config))
    return handle


def test_structs_are_as_large_as_the_compiler_makes_them(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the tests need a C compiler"
    names = ("HrVector", "HrBuffer", "HrOperand", "HrRope", "HrKvShape", "HrOp", "HrExecutorConfig")
    structs = {name: getattr(encoding, name) for name in names} | {"HrStepBatch": executor_module._StepStruct}
    lines = "".join(f'printf("%zu\\n", sizeof({name}));' for name in structs)
    source = tmp_path / "sizes.c"
    header = (ROOT / "kernels/csrc/headrace_native.h").read_text().replace('extern "C"', "extern")
    source.write_text(f"#include <stdio.h>\n{header}\nint main(void) {{ {lines} return 0; }}\n")
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "sizes")], check=True)
    sizes = subprocess.run([str(tmp_path / "sizes")], check=True, capture_output=True, text=True).stdout.split()
    assert [ctypes.sizeof(struct) for struct in structs.values()] == [int(size) for size in sizes]
