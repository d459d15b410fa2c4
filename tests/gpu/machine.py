"""Which machine runs the GPU kernels in this process. Read by conftest.py and by tests that depend on it."""

from __future__ import annotations

import importlib.util
import os
import sys

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
IS_TTSEM = "ttsem.pidraces" in sys.modules  # `python -m ttsem.sanitize pytest ...`


def why_not() -> str | None:
    """Why no kernel can run in this process; None where one can."""
    for name in ("torch", "triton"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    if IS_INTERPRETED:
        return None
    import torch

    if torch.cuda.is_available():
        return None
    return "no CUDA device, and TRITON_INTERPRET is not 1"


def lacks_fp8(device: str) -> bool:
    """Whether this GPU knows no fp8: Triton refuses the type before sm_89. The interpreter knows it."""
    if device != "cuda":
        return False
    import torch

    return torch.cuda.get_device_capability() < (8, 9)
