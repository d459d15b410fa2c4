"""Block sizes of the products, as data: what the tuning tables hold, and defaults that are valid on every target.

None of these change a row's bits: what does (columns per block, chunks of K) is fixed by the weight (`layout.py`).
Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


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


def default_config(kind: str, m: int, *, groups: int = 4, has_zeros: bool = True) -> LinearConfig:
    """For a product of m rows: what spills on no target (docs/KERNELS.md has the figures).

    groups: of a block of K (`layout.BlockLayout`). With zeros too, a program keeps the most sums in registers.
    """
    is_heavy = groups > 1 and has_zeros
    if m <= 16:
        is_wide = kind.startswith("fp8") or (kind == "int8" and is_heavy)
        return LinearConfig(16, 64, 4, 4) if is_wide else LinearConfig(16, 32, 2, 4)
    is_int4_heavy = kind == "int4" and is_heavy
    if m <= 32 or is_int4_heavy:
        is_wide = kind.startswith("fp8") or is_int4_heavy
        shape = LinearConfig(32, 64, 4, 3) if is_wide else LinearConfig(32, 32, 2, 4)
        return replace(shape, split_programs=512 if m <= 64 else 0)
    if m <= 64:
        return LinearConfig(64, 64, 4, 3)
    if kind == "int4" and has_zeros:
        return LinearConfig(64, 64, 4, 3, split_programs=0)
    if kind in ("int4", "int8", "fp8_block"):
        return LinearConfig(64, 128, 8, 3, split_programs=0)
    return LinearConfig(128, 128, 8, 3, split_programs=0)


def for_heads(config: LinearConfig, kind: str, head_dim: int) -> LinearConfig:
    """`config` where a tile must be one head: 16 rows of the weight per warp, and as many rows of x as registers
    allow besides the two halves of a head."""
    most = (4096 if kind == "int4" else 8192) // head_dim
    warps = max(1, min(8, head_dim // 16))
    return replace(config, block_n=head_dim, block_m=max(16, min(config.block_m, most, 64)), num_warps=warps)
