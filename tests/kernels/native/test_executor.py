"""The native executor where it is more than the sum of its ops: refusals, order of rows, isolation, memory, threads."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from headrace.kernels.batch import RowSampling, StepBatch
from headrace.kernels.native import encode as encoding
from headrace.kernels.native import library
from headrace.kernels.native.encode import encode
from headrace.kernels.native.executor import PROFILE_VARIABLE, NativeExecutor, pack
from headrace.kernels.native.fuse import fuse
from headrace.kernels.native.ops import MatMul, NativeProgram, Norm, form_of, pack_specs
from headrace.kernels.program import KvLayout
from headrace.models.load import LoadedModel, load_model

from tests.conftest import TinyModels
from tests.support.stepping import logits_in_chunks, step_batch
from tests.support.tiny_models import VOCAB_SIZE

ROOT = Path(__file__).parents[3]
BLOCK = 4


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> LoadedModel:
    return load_model(tiny_models.gguf("llama", "Q4_1"))


def make(model: LoadedModel, num_blocks: int = 12, **options: Any) -> NativeExecutor:
    options = {"num_threads": 2, "max_num_batched_tokens": 16, "max_logit_rows": 8, **options}
    return NativeExecutor(model.program, model.weights, num_blocks=num_blocks, block_size=BLOCK, **options)


@pytest.fixture(scope="module")
def executor(model: LoadedModel) -> NativeExecutor:
    return make(model)


GOOD = step_batch([([5, 6, 7], 0, [2]), ([8, 9], 0, [4])], BLOCK)


def test_results_follow_logit_rows(model: LoadedModel) -> None:
    everything = make(model).forward(GOOD)
    some = replace(GOOD, logit_rows=np.array([0, 2, 4], np.int32), sampling=(RowSampling(),) * 3)
    executor = make(model)
    np.testing.assert_array_equal(executor.forward(some), everything[[0, 2, 4]])
    assert [result.token_id for result in executor.execute(some)] == everything[[0, 2, 4]].argmax(1).tolist()


def test_a_step_may_want_no_logits(model: LoadedModel) -> None:
    executor = make(model)
    batch = step_batch([([5, 6, 7], 0, [2])], BLOCK)
    assert executor.execute(replace(batch, logit_rows=np.zeros(0, np.int32), sampling=())) == []
    after = executor.forward(step_batch([([8], 3, [2])], BLOCK))
    want = logits_in_chunks(make(model), [5, 6, 7, 8], 4, [7], BLOCK)[-1:]  # type: ignore[arg-type]
    np.testing.assert_array_equal(after, want)


def test_rows_are_sampled_as_they_ask(model: LoadedModel) -> None:
    """One step with every kind of row: greedy, drawn, scored, biased, banned, penalised, with log-probabilities."""
    from headrace.kernels.sample import sample

    executor = make(model)
    batch = step_batch([([5, 6, 7, 8, 9, 10, 11], 0, [2, 3])], BLOCK)
    greedy = int(executor.forward(batch)[1].argmax())
    rows = (
        RowSampling(),
        RowSampling(banned=(greedy,)),
        RowSampling(temperature=0.8, top_k=20, seed=3, position=9, num_logprobs=2),
        RowSampling(target=17, num_logprobs=0),
        RowSampling(logit_bias=((40, 100.0),)),
        RowSampling(repetition_penalty=1.7, prompt_ids=[5, 6, 7], output_ids=[greedy], presence_penalty=0.5),
        RowSampling(temperature=1.2, top_p=0.7, min_p=0.01, seed=5, position=3),
    )
    batch = replace(batch, sampling=rows)
    want = sample(executor.forward(batch), rows)
    got = executor.execute(batch)
    assert [r.token_id for r in got] == [r.token_id for r in want]
    assert got[4].token_id == 40
    np.testing.assert_allclose([r.logprob for r in got], [r.logprob for r in want], atol=1e-5)
    assert [[i for i, _ in r.top] for r in got] == [[i for i, _ in r.top] for r in want]


def test_what_a_freed_block_holds_reaches_nobody(tiny_models: TinyModels) -> None:
    """A sequence of NaN (a fault of the model) leaves its blocks to others, which run beside it and after it."""
    model = load_model(tiny_models.gguf("llama3"))  # its output head is not the embedding
    table = np.array(model.weights["token_embd.weight"])
    table[9] = np.nan
    broken = replace(model, weights={**model.weights, "token_embd.weight": table})
    for kv_dtype in ("fp32", "fp16", "bf16", "int8"):
        executor = make(broken, num_blocks=4, kv_dtype=kv_dtype)
        clean = executor.forward(step_batch([([5, 6], 0, [0])], BLOCK))
        mixed = step_batch([([9, 9, 9, 9], 0, [2]), ([5, 6], 0, [0])], BLOCK, last_only=True)
        assert [result.is_finite for result in executor.execute(mixed)] == [False, True]
        after = executor.forward(step_batch([([5, 6], 0, [2])], BLOCK))
        np.testing.assert_array_equal(after, clean)
        decode = executor.execute(step_batch([([7], 2, [2]), ([7], 2, [0]), ([5], 0, [3])], BLOCK))
        assert all(result.is_finite for result in decode)


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
        step_batch([([5], 0, [2])], BLOCK).__class__(
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
        (change_op(-2, selects_rows=False), "operands differ in rows"),
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
    assert "bytes are too few" in library.last_error()


def _create(config: encoding.HrExecutorConfig) -> int | None:
    native = library.load()
    for name, value in {"num_blocks": 4, "block_size": 4, "max_tokens": 4, "max_logit_rows": 4}.items():
        setattr(config, name, value)
    config.num_threads = 1
    handle: int | None = native.hr_executor_create(ctypes.byref(config))
    return handle


def test_structs_are_as_large_as_the_compiler_makes_them(tmp_path: Path) -> None:
    from headrace.kernels.native import executor as module

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the tests need a C compiler"
    names = ("HrVector", "HrBuffer", "HrOperand", "HrRope", "HrKvShape", "HrOp", "HrExecutorConfig")
    structs = {name: getattr(encoding, name) for name in names} | {"HrStepBatch": module._StepStruct}
    lines = "".join(f'printf("%zu\\n", sizeof({name}));' for name in structs)
    source = tmp_path / "sizes.c"
    header = (ROOT / "kernels/csrc/headrace_native.h").read_text().replace('extern "C"', "extern")
    source.write_text(f"#include <stdio.h>\n{header}\nint main(void) {{ {lines} return 0; }}\n")
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "sizes")], check=True)
    sizes = subprocess.run([str(tmp_path / "sizes")], check=True, capture_output=True, text=True).stdout.split()
    assert [ctypes.sizeof(struct) for struct in structs.values()] == [int(size) for size in sizes]


# ---- Memory, threads, names ----


def test_untouched_blocks_cost_nothing(model: LoadedModel) -> None:
    before = psutil.Process().memory_info().rss
    executor = make(model, num_blocks=1 << 16)  # 3 layers x 2 x 64 MiB of KV blocks
    executor.forward(step_batch([([5, 6, 7], 0, [60_000])], BLOCK))
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_name_says_what_computes(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for isa in library.info().usable:
        monkeypatch.setenv(library.ISA_VARIABLE, isa)
        assert make(model).name == f"native-{isa}"
    monkeypatch.setenv(library.ISA_VARIABLE, "abacus")
    with pytest.raises(ValueError, match="cannot run here"):
        make(model)


def test_close_gives_the_threads_back(model: LoadedModel) -> None:
    before = psutil.Process().num_threads()
    executor = make(model, num_threads=4)
    assert psutil.Process().num_threads() == before + 3
    executor.close()
    executor.close()
    assert psutil.Process().num_threads() == before
    with pytest.raises(ValueError, match="closed"):
        executor.forward(GOOD)
    make(model, num_threads=3)  # dropped without a word
    gc.collect()
    assert psutil.Process().num_threads() == before


def test_the_interpreter_runs_on_while_a_step_computes(model: LoadedModel) -> None:
    """The call releases the GIL: two executors step at the same time, each on its own threads."""
    executors = [make(model, num_threads=1) for _ in range(2)]
    want = executors[0].forward(GOOD)
    wrong: list[int] = []

    def step(executor: NativeExecutor) -> None:
        wrong.extend(i for i in range(50) if not np.array_equal(executor.forward(GOOD), want))

    threads = [threading.Thread(target=step, args=(executor,)) for executor in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_profile(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = make(model)
    quiet.execute(GOOD)
    assert {op.nanoseconds for op in quiet.times()} == {0}
    monkeypatch.setenv(PROFILE_VARIABLE, "1")
    executor = make(model)
    executor.execute(GOOD)
    times = executor.times()
    assert [op.kind for op in times[:3]] == ["embed", "norm", "linear"]
    assert [op.kind for op in times[-2:]] == ["plan", "sample"]
    assert all(op.nanoseconds > 0 for op in times)
    assert times[1].name == "blk.0.attn_norm.weight"


COUNTER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stddef.h>
static atomic_long count;
static void *(*real_malloc)(size_t), *(*real_realloc)(void *, size_t);
static int (*real_aligned)(void **, size_t, size_t);
long allocations(void) { return count; }
void *malloc(size_t n) {
  if (!real_malloc) real_malloc = dlsym(RTLD_NEXT, "malloc");
  count++;
  return real_malloc(n);
}
void *realloc(void *p, size_t n) {
  if (!real_realloc) real_realloc = dlsym(RTLD_NEXT, "realloc");
  count++;
  return real_realloc(p, n);
}
int posix_memalign(void **p, size_t a, size_t n) {
  if (!real_aligned) real_aligned = dlsym(RTLD_NEXT, "posix_memalign");
  count++;
  return real_aligned(p, a, n);
}
"""

COUNTING = """
    import ctypes, sys
    sys.path.insert(0, {root!r})
    from headrace.kernels.batch import RowSampling
    from headrace.kernels.native.executor import NativeExecutor
    from headrace.models.load import load_model
    from dataclasses import replace
    from tests.support.stepping import step_batch
    counter = ctypes.CDLL({shim!r})
    counter.allocations.restype = ctypes.c_long
    model = load_model({model!r})
    before = counter.allocations()
    executor = NativeExecutor(model.program, model.weights, num_blocks=64, block_size=4, num_threads=3)
    assert counter.allocations() > before + 10
    sampling = RowSampling(temperature=0.9, top_k=9, top_p=0.8, repetition_penalty=1.3, prompt_ids=[4], num_logprobs=4)
    prefill = step_batch([(list(range(3, 100)), 0, list(range(30)))], 4)
    decode = step_batch([([i], 4 * i, list(range(30 + i, 40 + i))) for i in range(9)], 4)
    prefill, decode = (replace(b, sampling=(sampling,) * len(b.logit_rows)) for b in (prefill, decode))
    run, counts = executor._library.hr_executor_run, []
    def counted(*arguments):
        before = counter.allocations()
        status = run(*arguments)
        counts.append(counter.allocations() - before)
        return status
    class Library:
        hr_executor_run = staticmethod(counted)
    executor._library = Library
    for batch in (prefill, decode) * 3:
        executor.execute(batch)
    baseline = counter.allocations()
    baseline = counter.allocations() - baseline
    print(counts, baseline)
    assert baseline == 0
    assert counts[2:] == [0] * 4, counts
"""


def test_a_step_allocates_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    """Counted by a malloc of our own, preloaded into a process: around the native call, all threads, after one step of
    each kind. Its count is shown to work by the executor's own making."""
    if sys.platform != "linux":
        pytest.skip("counts by LD_PRELOAD, which is Linux's")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "the tests need a C compiler"
    source, shim = tmp_path / "counter.c", tmp_path / "counter.so"
    source.write_text(COUNTER)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", str(source), "-o", str(shim), "-ldl"], check=True
    )
    script = textwrap.dedent(COUNTING).format(
        root=str(ROOT), shim=str(shim), model=str(tiny_models.gguf("llama", "Q4_1"))
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_norms_are_exported_as_vectors(model: LoadedModel) -> None:
    program, packed = native_of(model)
    used = {op.weight for op in program.ops if isinstance(op, Norm)}
    assert used <= set(packed.vectors)
