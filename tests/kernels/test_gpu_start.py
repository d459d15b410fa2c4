"""What the GPU back end decides at start, without a GPU: memory, the age of GPU and driver, tables of block sizes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from headrace.kernels.gpu import device, memory, tuning
from headrace.kernels.gpu.device import Gpu
from headrace.kernels.gpu.ops import WeightForm
from headrace.kernels.program import KvLayout, StepProgram, WeightSpec

GIB = 1 << 30
# 8 G weights, half of them in one matrix of int4 groups of 32 with zeros.
PROGRAM = StepProgram(
    (), (), (WeightSpec("a", (1 << 16, 1 << 16)), WeightSpec("b", (1 << 16, 1 << 16)), WeightSpec("n", (1024,))), (), 10
)
DENSE = {"a": WeightForm("dense"), "b": WeightForm("dense")}
QUANT = {"a": WeightForm("int4", 32, has_zeros=True), "b": WeightForm("int8", 32)}


def test_weights_take_what_their_form_takes() -> None:
    count = 1 << 32
    assert memory.weight_bytes(PROGRAM, DENSE, "bf16") == 2 * 2 * count + 4 * 1024
    assert memory.weight_bytes(PROGRAM, DENSE, "fp32") == 2 * 4 * count + 4 * 1024
    int4, int8 = count // 2 + 2 * 2 * count // 32, count + 2 * count // 32
    assert memory.weight_bytes(PROGRAM, QUANT, "bf16") == int4 + int8 + 4 * 1024


def test_a_kv_block_is_k_and_v_of_all_layers() -> None:
    layouts = (KvLayout(8, 128), KvLayout(2, 64, window=100))
    assert memory.kv_block_bytes(layouts, 64, "bf16") == 2 * 64 * (8 * 128 + 2 * 64) * 2
    assert memory.kv_block_bytes(layouts, 64, "fp8") == memory.kv_block_bytes(layouts, 64, "fp32") / 4


def test_too_little_memory_is_told_with_what_is_missing_and_what_would_fit() -> None:
    memory.check_weights_fit(18 * GIB, PROGRAM, DENSE, "bf16", GIB, "a GPU")
    with pytest.raises(memory.GpuMemoryError) as failure:
        memory.check_weights_fit(12 * GIB, PROGRAM, DENSE, "bf16", GIB, "a GPU")
    text = str(failure.value)
    assert "a GPU has 12.00 GiB of memory free and this model needs 17.75 GiB" in text
    assert "5.75 GiB are missing" in text
    assert "as Q8_0 would fit (weights of 8.50 GiB)" in text
    with pytest.raises(memory.GpuMemoryError, match="as Q4_1 would fit"):
        memory.check_weights_fit(8 * GIB, PROGRAM, DENSE, "bf16", GIB, "a GPU")
    with pytest.raises(memory.GpuMemoryError, match="no quantisation of this model would fit"):
        memory.check_weights_fit(4 * GIB, PROGRAM, DENSE, "bf16", GIB, "a GPU")


def test_what_the_weights_leave_is_kv_blocks() -> None:
    sizes: dict[str, Any] = {"total": 80 * GIB, "fraction": 0.9, "block_bytes": 8 << 20, "gpu": "a GPU"}
    count = memory.num_kv_blocks(free=60 * GIB, least_blocks=4, kv_dtype="bf16", **sizes)
    usable = 60 * GIB - 8 * GIB - memory.RESERVE_BYTES
    assert (count + 1) * (8 << 20) <= usable < (count + 2) * (8 << 20)  # the null block is one of them
    with pytest.raises(memory.GpuMemoryError, match=r"are missing; --kv-dtype fp8 halves"):
        memory.num_kv_blocks(free=8 * GIB, least_blocks=4, kv_dtype="bf16", **sizes)
    with pytest.raises(memory.GpuMemoryError, match="smaller --max-model-len"):
        memory.num_kv_blocks(free=8 * GIB, least_blocks=4, kv_dtype="fp8", **sizes)


def gpu(capability: tuple[int, int]) -> Gpu:
    return Gpu("a GPU", capability, 80 * GIB, 100, (12, 8))


def test_a_gpu_that_is_too_old_is_told_so() -> None:
    assert device.too_old(gpu((8, 0))) == device.too_old(gpu((10, 0))) == ""
    problem = device.too_old(gpu((7, 5)))
    assert "a GPU has compute capability 7.5" in problem
    assert "8.0 or newer" in problem
    assert gpu((8, 9)).arch == "sm_89"


def test_a_driver_that_is_too_old_for_torch_is_told_so() -> None:
    assert device.driver_mismatch((13, 0), "13.0") == device.driver_mismatch((12, 2), "12.9") == ""
    problem = device.driver_mismatch((12, 8), "13.0")
    assert "driver is for CUDA 12.8" in problem
    assert "update the driver" in problem
    assert "without CUDA" in device.driver_mismatch((13, 0), None)


def test_without_a_gpu_there_is_a_reason() -> None:
    found = device.probe()
    assert not found.is_usable or found.gpu is not None
    assert found.why


ENTRY = {"op": "linear", "shape": {"n": 64, "k": 32, "kind": "int4"}, "m": 16, "config": {"block_n": 32, "split": 4}}


def table(*entries: dict[str, Any], **changes: str) -> tuning.Table:
    data = {"gpu": "NVIDIA H100", "arch": "sm_90", "triton": "3.6.0", "entries": list(entries), **changes}
    return tuning.parse_table(json.loads(json.dumps(data)), "test.json")


def test_the_smallest_tuned_row_count_that_is_enough_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {**ENTRY, "m": 64, "config": {"block_n": 128, "split": 4}}
    monkeypatch.setattr(tuning, "load_tables", lambda: (table(wide, ENTRY),))
    shape = {"n": 64, "k": 32, "kind": "int4"}
    for m, block_n in ((1, 32), (16, 32), (17, 128), (1000, 128)):
        assert tuning.lookup("linear", "NVIDIA H100", "sm_90", m=m, **shape)["block_n"] == block_n
    assert tuning.lookup("linear", "NVIDIA H200", "sm_90", m=1, **shape)["block_n"] == 32  # of the same architecture
    assert tuning.lookup("linear", "NVIDIA A100", "sm_80", m=1, **shape) == {}
    assert tuning.lookup("linear", "NVIDIA H100", "sm_90", m=1, n=65, k=32, kind="int4") == {}
    monkeypatch.setattr(tuning, "load_tables", lambda: (table(ENTRY), table(wide, gpu="NVIDIA H200")))
    assert tuning.lookup("linear", "NVIDIA H200", "sm_90", m=1, **shape)["block_n"] == 128  # its own table first


def test_a_table_whose_sums_would_depend_on_the_rows_is_refused() -> None:
    attention = {**ENTRY, "op": "paged_attention"}
    other = {**attention, "m": 64, "config": {"block_n": 32, "split": 2}}
    with pytest.raises(tuning.TuningTableError, match="sums in different orders"):
        table(attention, other)
    table(attention, {**other, "config": attention["config"]})
    with pytest.raises(tuning.TuningTableError, match="no op"):
        table({**ENTRY, "op": "conv"})
    with pytest.raises(tuning.TuningTableError, match="no integer"):
        table({**ENTRY, "config": {"block_n": "wide"}})
    with pytest.raises(tuning.TuningTableError, match="needs a shape"):
        table({"op": "linear", "m": 1, "config": {}})


def test_the_tables_of_this_package_can_be_used() -> None:
    for path in tuning.FOLDER.glob("*.json"):
        assert path.name == tuning.table_name(tuning.load_table(path).gpu)
    assert tuning.table_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
