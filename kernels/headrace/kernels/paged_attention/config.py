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

    What changes a row's bits, fixed by the model alone: block_n (KV positions per tile; divides block_size), split (KV
    positions per split, a multiple of block_n) and, through the model's group, which sequences are split.
    What does not: block_m of prefill, warps, stages, and max_programs, a bound on the split kernel's grid (programs
    beyond the work are not launched; programs fewer than it take turns).
    """

    block_n: int = 64
    split: int = 512
    split_warps: int = 4
    split_stages: int = 3
    prefill_block_m: int = 128
    prefill_warps: int = 8
    prefill_stages: int = 2
    max_programs: int = 4096

    def __post_init__(self) -> None:
        for name in ("block_n", "prefill_block_m", "split_warps", "prefill_warps"):
            value = getattr(self, name)
            if value <= 0 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, is {value}")
        if self.block_n < 16 or self.prefill_block_m < 16:
            raise ValueError("block_n and prefill_block_m must be at least 16, what a matrix instruction takes")
        if self.split % self.block_n or self.split <= 0:
            raise ValueError(f"split must be a multiple of block_n = {self.block_n}, is {self.split}")
        if self.max_programs < 1 or self.split_stages < 1 or self.prefill_stages < 1:
            raise ValueError("max_programs and stages must be at least 1")
