"""Triton's interpreter, corrected: the machine that tests/gpu/numerics runs on where there is no GPU.

`install()` is called once by tests/gpu/conftest.py (and by scripts), before any kernel is imported, in a process with
TRITON_INTERPRET=1. It replaces parts of triton.runtime.interpreter (written for triton 3.6.0) for the whole process:

- numbers.py: arithmetic that means what a GPU means (bf16, fp8, TF32, NaN in max, undefined masked lanes ...);
- reduce.py: reductions and scans in a tree, as a GPU does them, and quick ones;
- ptx.py: the few inline-PTX instructions that our kernels use;
- launch.py: the loop over program instances, in any order; loop variables are int32 tensors, as on a GPU;
- memory.py: loads, stores and atomics; each pointer knows the argument that it came from;
- sanitizer.py: every access inside its own argument, no two program instances racing, bytes requested and unique.
"""

from __future__ import annotations

import os


def install() -> None:
    """Correct the interpreter of this process. Idempotent; raises RuntimeError without TRITON_INTERPRET=1."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("the interpreter is chosen when triton is imported: set TRITON_INTERPRET=1 before")
    from tests.gpu.interpreter import launch, memory, numbers, ptx, reduce

    for part in (numbers, reduce, ptx, memory, launch):
        part.install()
