"""Tuning parameters of the Triton attention kernels: data that the tables of `headrace.kernels.gpu` hold.

Imports nothing heavy: tables are read, and configurations checked, without Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

# Rows (query tokens times heads of a group) up to which a sequence's attention is split over its KV.
MAX_SPLIT_ROWS = 64


@dataclass(frozen=True)
class AttentionConfig:
    """Valid on every target as it stands.

    What changes a row's bits, fixed by the model alone: block_n (KV positions per tile; divides block_size) and split
    (KV positions per split, a multiple of block_n).
    What does not: block_m of prefill, warps, stages, and max_programs, a bound on the split kernel's grid (programs
    beyond the work are not launched; programs fewer than it take turns). verify: the split kernel's larger tile.
    """

    block_n: int = 64
    split: int = 512
    split_warps: int = 4
    split_stages: int = 3
    verify_warps: int = 8
    verify_stages: int = 2
    prefill_block_m: int = 128
    prefill_warps: int = 8
    prefill_stages: int = 2
    max_programs: int = 4096

    def __post_init__(self) -> None:
        for name in ("block_n", "prefill_block_m", "split_warps", "verify_warps", "prefill_warps"):
            value = getattr(self, name)
            if value <= 0 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, is {value}")
        if self.block_n < 16 or self.prefill_block_m < 16:
            raise ValueError("block_n and prefill_block_m must be at least 16, what a matrix instruction takes")
        if self.split % self.block_n or self.split <= 0:
            raise ValueError(f"split must be a multiple of block_n = {self.block_n}, is {self.split}")
        if min(self.max_programs, self.split_stages, self.verify_stages, self.prefill_stages) < 1:
            raise ValueError("max_programs and stages must be at least 1")


def default_config(
    *,
    head_dim: int,
    compute_bytes: int,
    kv_bytes: int,
    block_size: int,
    has_window_or_cap: bool = False,
    arch: str = "",
) -> AttentionConfig:
    """For a model's shape and types, without spilled registers on any of sm_80, 89, 90, 100 and gfx942.

    compute_bytes, kv_bytes: size of an element of the queries and of the cache. arch: "sm_90", "gfx942", or "" where it
    is not known; block_n and split do not depend on it. Figures: triton 3.6.0.
    """
    if compute_bytes == 4:
        # No matrix instruction takes fp32 exactly, and products by hand fill the registers.
        block_n = min(16, block_size)
        return AttentionConfig(block_n=block_n, split_stages=2, verify_warps=4, prefill_block_m=16, prefill_warps=4)
    block_n = min(64 if head_dim <= 128 else 32, block_size)
    is_amd = arch.startswith("gfx")
    # The prefill kernel keeps two accumulators, of the split and of those before it, in 255 registers a thread.
    if is_amd:
        prefill_rows = 64
    elif arch.startswith(("sm_9", "sm_1")):
        prefill_rows = 64 if has_window_or_cap or head_dim > 128 else 128
    elif 64 < head_dim < 128:
        prefill_rows = 16  # two parts, each with its two accumulators
    elif head_dim < 32:
        prefill_rows = 32
    else:
        prefill_rows = 64 if kv_bytes == 2 and head_dim <= 128 else 32
    return AttentionConfig(
        block_n=block_n,
        # 256 registers of 512 a thread are all that eight wavefronts leave each other.
        verify_warps=4 if is_amd or head_dim < 32 else 8,
        prefill_warps=4 if is_amd or prefill_rows == 16 or head_dim < 32 else 8,
        prefill_block_m=prefill_rows,
    )
