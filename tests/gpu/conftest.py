"""Fixtures of the GPU kernels' tests. They need triton, which the main suite does not: `make gpu-gates` runs them.

Three machines run the same tests (docs/KERNELS.md says what each proves):
- TRITON_INTERPRET=1: the corrected interpreter of tests/gpu/interpreter, on CPU tensors;
- `python -m ttsem.sanitize pytest ...`: Triton's own IR, executed on a CPU, which says that it is a CUDA device;
- a GPU, where torch finds one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator

import pytest

from tests.gpu.machine import IS_INTERPRETED, IS_TTSEM, why_not

os.environ.setdefault("OMP_NUM_THREADS", "1")

WHY_NOT = why_not()
if WHY_NOT is not None:
    collect_ignore_glob = ["*"]
elif not IS_INTERPRETED:
    from tests.gpu import ttsem_order

    ttsem_order.install()
    collect_ignore = ["interpreter"]
else:
    from tests.gpu.interpreter import install

    install()  # before any test module imports a kernel


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WHY_NOT is not None:
        terminalreporter.section("tests/gpu was NOT run")
        terminalreporter.line(f"{WHY_NOT}; `make gpu-gates` sets up what the GPU kernels' tests need and runs them")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Tests that compare inline PTX with its plain twin, for every input, are for the other machines."""
    try:
        return (yield)
    except Exception as error:
        if IS_TTSEM and type(error).__name__ == "Unjudged" and "does not model PTX" in str(error):
            # Nothing goes unchecked: twins run here too, and tests over all 2^16 words hold PTX and twin together.
            pytest.skip("inline PTX: ttsem judges its plain twin")
        raise


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """HEADRACE_GPU_QUICK=4 keeps at most four parametrisations of a test, evenly spread over them."""
    most = int(os.environ.get("HEADRACE_GPU_QUICK", "0"))
    if most <= 0:
        return
    families: dict[str, list[pytest.Item]] = {}
    for item in items:
        families.setdefault(item.nodeid.split("[")[0], []).append(item)
    kept = {id(family[len(family) * i // most]) for family in families.values() for i in range(most)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


@pytest.fixture(scope="session", autouse=True)
def _plain_twins_under_ttsem() -> None:
    """ttsem does not know PTX: where a kernel has inline PTX it gets to judge the plain twin."""
    for name, module in list(sys.modules.items()):
        if IS_TTSEM and name.startswith("headrace.kernels.") and hasattr(module, "_has_ptx"):
            module._has_ptx = lambda: False  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors live: "cpu" under the interpreter, else "cuda"."""
    return "cpu" if IS_INTERPRETED else "cuda"
