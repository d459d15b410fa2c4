"""A GPU that is there and cannot be used: what the operator reads, and that the CPU is taken only when asked for.

The driver is a library made on the spot that answers as NVIDIA's does on such a machine; ours is what runs, as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

if shutil.which("gcc") is None:
    # The library stands in for a driver's C ABI: it cannot be had without a compiler.
    pytest.skip("no gcc to make a stand-in for the driver's library with", allow_module_level=True)

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
static int number(const char* name) { const char* text = getenv(name); return text ? atoi(text) : 0; }
int cuInit(unsigned flags) { return number("FAKE_INIT"); }
int cuDriverGetVersion(int* version) { *version = 12080; return 0; }
int cuDeviceGetCount(int* count) { *count = number("FAKE_COUNT"); return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDeviceGetName(char* name, int size, int device) { strncpy(name, "Tesla Example", size); return 0; }
int cuDeviceTotalMem_v2(size_t* size, int device) { *size = 16ull << 30; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? number("FAKE_MAJOR") : attribute == 76 ? number("FAKE_MINOR") : 40;
  return 0;
}
"""
CHOOSE = """
import sys
from headrace.models.errors import ModelError
from headrace.server import backends
try:
    choice = backends.choose(sys.argv[1])
    print(choice.name, choice.is_fallback, choice.why, sep="|")
except ModelError as error:
    print("refused", error, sep="|")
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine with that driver, and with a package triton (which is looked for, not imported)."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(SOURCE)
    (folder / "triton").mkdir()
    (folder / "triton" / "__init__.py").write_text("raise ImportError('nobody may need this to learn of the GPU')\n")
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "cuda.c")]
    subprocess.run(command, check=True)
    paths = {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder)}
    return {**{k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "CUDA", "HEADRACE_BACK"))}, **paths}


def choose(machine: dict[str, str], wanted: str, **driver: int) -> list[str]:
    environment = {**machine, **{f"FAKE_{name.upper()}": str(value) for name, value in driver.items()}}
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, wanted], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip().split("|")


TURING = {"count": 1, "major": 7, "minor": 5}


@pytest.mark.parametrize(
    ("driver", "reasons"),
    [
        (TURING, ["Tesla Example has compute capability 7.5", "8.0 or newer"]),
        ({"init": 803}, ["different driver versions", "reboot or reload the module", "the host's libcuda"]),
        ({"init": 999}, ["the NVIDIA driver does not start", "CUDA error 999"]),
    ],
)
def test_a_gpu_that_cannot_be_used_is_no_reason_to_serve_slowly(
    machine: dict[str, str], driver: dict[str, int], reasons: list[str]
) -> None:
    outcome, text = choose(machine, "auto", **driver)
    assert outcome == "refused"
    assert all(reason in text for reason in reasons), text
    assert "--backend native serves on the CPU" in text
    outcome, text = choose(machine, "triton", **driver)
    assert outcome == "refused"
    assert all(reason in text for reason in reasons), text


def test_the_cpu_is_taken_where_it_is_asked_for(machine: dict[str, str]) -> None:
    name, is_fallback, _ = choose(machine, "torch", **TURING)
    assert (name, is_fallback) == ("torch", "False")


@pytest.mark.parametrize("driver", [{"init": 100}, {"count": 0}])
def test_a_driver_without_a_gpu_is_a_cpu_machine(machine: dict[str, str], driver: dict[str, int]) -> None:
    assert choose(machine, "auto", **driver)[0] in ("native", "torch")
    outcome, text = choose(machine, "triton", **driver)
    assert outcome == "refused"
    assert "the driver shows no GPU" in text
    assert "CUDA_VISIBLE_DEVICES" in text


def test_a_gpu_that_can_be_used_is_taken(machine: dict[str, str]) -> None:
    name, _, why = choose(machine, "auto", count=1, major=9, minor=0)
    assert name == "triton"
    assert "Tesla Example, sm_90, 16 GiB, driver for CUDA 12.8" in why
