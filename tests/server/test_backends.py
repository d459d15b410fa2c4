"""The choice of the back end: what is installed and what was asked for decide, and the operator learns the reason."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from headrace.kernels.gpu import device
from headrace.kernels.gpu.device import Gpu, Probe
from headrace.kernels.native import library
from headrace.kernels.program import KvLayout, StepProgram
from headrace.models.errors import ModelError
from headrace.server import backends, frames, model_host
from headrace.server.backends import Choice
from headrace.server.cli import hardware
from headrace.server.config import ConfigError, ServerConfig
from headrace.server.engine_build import build_engine


@pytest.fixture
def _no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv(library.LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    library.load.cache_clear()
    library.info.cache_clear()
    yield
    library.load.cache_clear()
    library.info.cache_clear()


@pytest.fixture
def _no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what an import of a package that is not there finds


def load_frame(path: Path, **settings: object) -> frames.Load:
    return msgspec.structs.replace(model_host.load_frame(ServerConfig(), path), **settings)


def test_the_native_library_is_chosen_where_it_loads() -> None:
    choice = backends.choose()
    assert (choice.name, choice.is_fallback) == ("native", False)
    assert library.info().isa in choice.why
    assert backends.choose("native") == choice


def test_what_was_asked_for_is_taken() -> None:
    choice = backends.choose("torch")
    assert (choice.name, choice.is_fallback) == ("torch", False)
    with pytest.raises(ModelError, match="no back end cuda"):
        backends.choose("cuda")


@pytest.mark.usefixtures("_no_library")
def test_torch_is_what_is_left_and_that_is_said_loudly(tiny_llama_gguf: Path, caplog: pytest.LogCaptureFixture) -> None:
    choice = backends.choose()
    assert (choice.name, choice.is_fallback) == ("torch", True)
    assert "absent.so" in choice.why
    assert "slower" in choice.why
    built = build_engine(load_frame(tiny_llama_gguf), lambda _: None)
    assert built.backend == "torch-cpu"
    assert [record.levelname for record in caplog.records if "absent.so" in record.getMessage()] == ["WARNING"]
    with pytest.raises(ModelError, match=r"absent\.so"):
        backends.choose("native")


@pytest.mark.usefixtures("_no_library", "_no_torch")
def test_with_neither_it_is_said_what_to_install() -> None:
    with pytest.raises(ModelError, match=r"absent\.so.*or.*pip install 'headrace\[server,torch\]'"):
        backends.choose()
    with pytest.raises(ModelError, match=r"pip install 'headrace\[server,torch\]'"):
        backends.choose("torch")
    chosen = [backend for backend in hardware.detect_backends(hardware.detect_machine()) if backend.is_chosen]
    assert chosen == []


def test_the_doctor_names_the_instruction_sets() -> None:
    native = hardware.detect_backends(hardware.detect_machine())[0]
    info = library.info()
    assert (native.name, native.is_available, native.is_chosen) == (f"native-{info.isa}", True, True)
    assert all(name in native.why for name in info.compiled)


@pytest.mark.usefixtures("_no_library")
def test_the_doctor_says_why_it_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = hardware.detect_machine()
    torch, native = hardware.detect_backends(machine)[:2]
    assert (torch.name, torch.is_chosen, native.is_available) == ("torch-cpu", True, False)
    assert "absent.so" in torch.why
    assert "absent.so" in native.why
    monkeypatch.setenv("HEADRACE_BACKEND", "native")
    assert not any(backend.is_chosen for backend in hardware.detect_backends(machine))


def test_kv_blocks_take_what_their_type_takes() -> None:
    layers = (KvLayout(3, 64), KvLayout(1, 40, window=8))
    program = StepProgram((), (), (), layers, 10)
    elements = 2 * 16 * (3 * 64 + 1 * 40)
    assert backends.kv_block_bytes(program, 16, "fp32") == 4 * elements
    assert backends.kv_block_bytes(program, 16, "fp16") == backends.kv_block_bytes(program, 16, "bf16") == 2 * elements
    assert backends.kv_block_bytes(program, 16, "int8") == elements + 4 * 2 * 16 * (3 + 1)
    odd = StepProgram((), (), (), (KvLayout(2, 3),), 10)
    assert backends.kv_block_bytes(odd, 5, "fp16") == 2 * 64  # 60 bytes a head, to a whole cache line


def test_each_back_end_keeps_keys_and_values_as_it_can() -> None:
    assert backends.choose_kv_dtype("native", "auto") == "fp16"
    assert backends.choose_kv_dtype("native", "int8") == "int8"
    assert backends.choose_kv_dtype("torch", "auto") == backends.choose_kv_dtype("torch", "fp32") == "fp32"
    with pytest.raises(ModelError, match="fp32 only, not in int8"):
        backends.choose_kv_dtype("torch", "int8")


@pytest.mark.parametrize(
    ("physical", "usable", "limit", "nodes", "count", "why"),
    [
        (8, 8, None, 1, 8, "one per physical core"),
        (8, 3, None, 1, 3, "may run on"),
        (8, 8, 2.5, 1, 2, "cgroup allows 2.5 CPUs"),
        (8, 8, 0.5, 1, 1, "cgroup allows 0.5 CPUs"),
        (2, 2, 4.0, 1, 2, "one per physical core"),
        (64, 64, None, 2, 64, "2 NUMA nodes"),
    ],
)
def test_threads_are_those_that_can_run_at_once(
    physical: int, usable: int, limit: float | None, nodes: int, count: int, why: str
) -> None:
    machine = hardware.Machine("", "", (), physical, 2 * physical, usable, nodes, limit, 1, 1, None, ())
    threads = hardware.choose_threads(machine)
    assert threads.count == count
    assert why in threads.why


@pytest.mark.parametrize(
    ("backend", "wanted", "budget"),
    [("native", 0, 192), ("native-avx2", 0, 192), ("torch", 0, 512), ("native", 64, 64)],
)
def test_a_step_has_room_for_a_token_of_every_sequence(backend: str, wanted: int, budget: int) -> None:
    assert backends.token_budget(backend, wanted, 64) == budget
    assert backends.token_budget(backend, 0, 4096) >= 4096


H100 = Gpu("NVIDIA H100", (9, 0), 80 << 30, 132, (13, 0))


def found(monkeypatch: pytest.MonkeyPatch, probe: Probe) -> None:
    """A machine on which the driver says this."""
    monkeypatch.setattr(device, "probe", lambda: probe)


def test_a_gpu_is_chosen_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, Probe(H100, "NVIDIA H100, sm_90"))
    assert backends.choose() == backends.choose("triton") == Choice("triton", "NVIDIA H100, sm_90", False)
    assert backends.choose("native").name == "native"
    first, *rest = hardware.detect_backends(hardware.detect_machine())
    assert (first.name, first.is_chosen, first.why) == ("triton-cuda", True, "NVIDIA H100, sm_90")
    assert not any(backend.is_chosen for backend in rest)


def test_a_gpu_that_cannot_be_used_is_an_error_and_no_silent_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, Probe(None, "a GTX 1080 has compute capability 6.1", is_broken=True))
    for wanted in ("auto", "triton"):
        with pytest.raises(ModelError, match=r"compute capability 6\.1"):
            backends.choose(wanted)
    with pytest.raises(ModelError, match="--backend native serves on the CPU"):
        backends.choose()
    assert backends.choose("native").name == "native"


def test_without_a_gpu_triton_says_why_and_auto_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, Probe(None, "no NVIDIA driver"))
    assert backends.choose().name == "native"
    with pytest.raises(ModelError, match="triton back end cannot run: no NVIDIA driver"):
        backends.choose("triton")


def test_the_interpreter_is_taken_only_where_it_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    found(monkeypatch, Probe(None, "interpreted", interprets=True))
    assert backends.choose().name == "native"
    assert backends.choose("triton") == Choice("triton", "interpreted", False)


def test_weights_are_quantised_at_load_on_a_gpu_alone(tiny_llama_gguf: Path) -> None:
    for backend in ("native", "torch"):
        with pytest.raises(ModelError, match=f"the {backend} back end serves weights as the file stores them.*GGUF"):
            build_engine(load_frame(tiny_llama_gguf, backend=backend, quantization="int8"), lambda _: None)
        backends.check_quantization(backend, "none")


def test_fp8_weights_need_a_gpu_that_multiplies_them(monkeypatch: pytest.MonkeyPatch, tiny_llama_gguf: Path) -> None:
    found(monkeypatch, Probe(replace(H100, name="NVIDIA A100", capability=(8, 0)), "NVIDIA A100, sm_80"))
    for wanted in ("fp8", "fp8-block"):
        with pytest.raises(ModelError, match=r"8\.9 or newer.*A100 has 8\.0 and can do --quantization int8"):
            build_engine(load_frame(tiny_llama_gguf, backend="triton", quantization=wanted), lambda _: None)
    backends.check_quantization("triton", "int8")
    found(monkeypatch, Probe(H100, "NVIDIA H100, sm_90"))
    backends.check_quantization("triton", "fp8-block")


def test_an_unknown_quantisation_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="quantization must be none, int8, fp8 or fp8-block"):
        ServerConfig(quantization="awq")  # type: ignore[arg-type]


def test_fp8_keys_and_values_are_the_gpus_alone() -> None:
    with pytest.raises(ModelError, match="not in fp8"):
        backends.choose_kv_dtype("native", "fp8")


def test_blocks_can_be_asked_for_by_tokens(tiny_llama_gguf: Path) -> None:
    built = build_engine(load_frame(tiny_llama_gguf, kv_cache_tokens=100, backend="native"), lambda _: None)
    assert built.engine.config.block_size == 16
    assert built.engine.config.num_blocks == 7
