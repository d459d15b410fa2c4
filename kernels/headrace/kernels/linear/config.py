"""Block sizes of the products, as data: what the tuning tables hold, and defaults that are valid on every target.

None of these change a row's bits: what does (columns per block, chunks of K) is fixed by the weight (`layout.py`).
Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearConfig:
    """block_m: rows of x per program. block_n: rows of the weight. group_n: tiles of weights that go
    through x together. split_programs: chunks of K are programs of their own where the tiles are fewer than this."""

    block_m: int = 16
    block_n: int = 32
    num_warps: int = 2
    num_stages: int = 4
    group_n: int = 8
    split_programs: int = 512

    def __post_init__(self) -> None:
        for name, allowed in (("block_m", (16, 32, 64, 128, 256)), ("block_n", (16, 32, 64, 128, 256))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, is {getattr(self, name)}")
        if self.num_warps not in (1, 2, 4, 8, 16) or not 1 <= self.num_stages <= 8:
            raise ValueError(f"num_warps {self.num_warps}, num_stages {self.num_stages}: no such launch")
        if self.group_n < 1 or self.split_programs < 0:
            raise ValueError("group_n must be at least 1 and split_programs at least 0")


def default_config(kind: str, m: int) -> LinearConfig:
    """For a product of m rows; the figures behind it are in docs/KERNELS.md."""
    if m <= 16:
        return LinearConfig(16, 32, 2, 4)
    if m <= 32:
        return LinearConfig(32, 32, 2, 4)
    if m <= 64:
        return LinearConfig(64, 64, 4, 3)
    return LinearConfig(128, 64, 4, 3, split_programs=0)
