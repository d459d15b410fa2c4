"""Which implementation computes attention: Triton always, flash-attn where it is installed and valid. Chosen once, at
start, with the reasons logged; called by `executor.py`.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from headrace.kernels.gpu.ops import Attention

log = logging.getLogger("headrace.kernels")

AttentionName = Literal["auto", "triton", "flash"]
_PACKAGE = "headrace.kernels.paged_attention"


@dataclass(frozen=True)
class AttentionUse:
    """What a model and a server ask of attention. kv_dtype, compute_dtype: as in `gpu.memory`; arch: "sm_90" or ""."""

    head_dims: tuple[int, ...]
    block_size: int
    compute_dtype: str
    kv_dtype: str
    has_window: bool
    has_soft_cap: bool
    arch: str
    is_interpreted: bool


@dataclass(frozen=True)
class AttentionChoice:
    """The module that has the contract of `headrace.kernels.paged_attention`, and why it is that one."""

    name: str
    module: ModuleType
    why: str


def use_of(ops: Sequence[Attention], **settings: object) -> AttentionUse:
    """What the attention ops of a program ask for; settings: the other fields of AttentionUse."""
    return AttentionUse(
        head_dims=tuple(sorted({op.head_dim for op in ops})),
        has_window=any(op.window for op in ops),
        has_soft_cap=any(op.soft_cap for op in ops),
        **settings,  # type: ignore[arg-type]
    )


def validate_triton(use: AttentionUse) -> list[str]:
    """Why the Triton kernels cannot do it: nothing, or what its own checks would refuse at the first step."""
    reasons = []
    if use.block_size not in (16, 32, 64, 128):
        reasons.append(f"block size {use.block_size}: the kernels take 16, 32, 64 or 128")
    reasons += [
        f"head_dim {head_dim}: the kernels take multiples of 16 from 16 to 256"
        for head_dim in use.head_dims
        if head_dim % 16 or not 16 <= head_dim <= 256
    ]
    return reasons


def validate_flash(use: AttentionUse) -> list[str]:
    """Why flash-attn cannot do it, beginning with whether it is there."""
    flash = importlib.import_module(f"{_PACKAGE}.flash")
    reasons = list(flash.is_available())
    if not reasons:
        reasons = flash.unsupported(head_dims=use.head_dims, block_size=use.block_size, arch=use.arch)
    if use.is_interpreted:
        reasons.append("kernels are interpreted on the CPU")
    if use.compute_dtype == "fp32" or use.kv_dtype not in ("fp16", "bf16"):
        reasons.append(f"keys and values in {use.kv_dtype}, activations in {use.compute_dtype}: it takes 16 bits alone")
    return reasons


@dataclass(frozen=True)
class _Implementation:
    name: str
    module: str
    validate: Callable[[AttentionUse], list[str]]


# By preference where it was not asked for by name. Triton comes first because its bits do not depend on the batch.
IMPLEMENTATIONS = (
    _Implementation("triton", "triton", validate_triton),
    _Implementation("flash", "flash", validate_flash),
)


def choose(use: AttentionUse, wanted: AttentionName = "auto") -> AttentionChoice:
    """The first implementation that is valid, or the one asked for. Raises ValueError with the reasons."""
    reasons: list[str] = []
    for implementation in IMPLEMENTATIONS:
        if wanted not in ("auto", implementation.name):
            continue
        problems = implementation.validate(use)
        if not problems:
            why = "asked for" if wanted != "auto" else "; ".join(reasons) or "the first that is valid"
            log.info("attention: %s (%s)", implementation.name, why)
            module = importlib.import_module(f"{_PACKAGE}.{implementation.module}")
            return AttentionChoice(implementation.name, module, why)
        reasons.append(f"{implementation.name}: {', '.join(problems)}")
    raise ValueError("no attention kernel takes this model: " + "; ".join(reasons))
