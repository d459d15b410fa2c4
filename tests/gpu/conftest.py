"""Fixtures of the GPU kernels' tests. They need triton, which the main suite does not: `make gpu-gates` runs them.

Three machines run the same tests (docs/KERNELS.md says what each proves):
- TRITON_INTERPRET=1: the corrected interpreter of tests/gpu/interpreter, on CPU tensors;
- `python -m ttsem.sanitize pytest ...`: Triton's own IR, executed on a CPU, which says that it is a CUDA device;
- a GPU, where torch finds one.
"""

from __future__ import annotations

import os

import pytest

from tests.gpu.machine import IS_INTERPRETED, why_not

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


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors live: "cpu" under the interpreter, else "cuda"."""
    return "cpu" if IS_INTERPRETED else "cuda"
