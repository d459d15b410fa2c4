"""Block sizes of the products, as data: what the tuning tables hold, and defaults for every target.

None of these change a row's bits: what does (columns per block, chunks of K) is fixed by the weight (`layout.py`).
Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

MANY_ROWS = 64  # more rows than these have no chunks of K as programs of their own: tiles enough without
WITH_TMA = ("sm_90", "sm_100")
# Where a tile of 128 x 256 fits the registers, K being one chunk. More would spill.
LARGEST_TILES = (("w8a8", "sm_90"), ("w8a8", "sm_100"), ("fp8", "sm_100"))


@dataclass(frozen=True)
class LinearConfig:
    """block_m: rows of x per program. block_n: rows of the weight. group_n: tiles of weights that go
    through x together. split_programs: chunks of K are programs of their own where the tiles are fewer than this.

    For many rows. programs_per_sm: a program takes one tile after the other, and this many share an SM; 0: a program
    for every tile. has_tma: x and weights come through tensor descriptors, where they are aligned to 16 bytes and
    not packed.
    """

    block_m: int = 16
    block_n: int = 32
    num_warps: int = 2
    num_stages: int = 4
    group_n: int = 8
    split_programs: int = 512
    programs_per_sm: int = 0
    has_tma: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("block_m", (16, 32, 64, 128, 256)), ("block_n", (16, 32, 64, 128, 256))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, is {getattr(self, name)}")
        if self.num_warps not in (1, 2, 4, 8, 16) or not 1 <= self.num_stages <= 8:
            raise ValueError(f"num_warps {self.num_warps}, num_stages {self.num_stages}: no such launch")
        if self.group_n < 1 or self.split_programs < 0 or self.programs_per_sm < 0:
            raise ValueError("group_n must be at least 1, split_programs and programs_per_sm at least 0")
        if self.has_tma and not self.programs_per_sm:
            raise ValueError("has_tma needs programs_per_sm: few rows are read through pointers")


def default_config(
    kind: str, m: int, *, groups: int = 4, has_zeros: bool = True, splits: int = 8, arch: str = ""
) -> LinearConfig:
    """For a product of m rows: what spills on no target (docs/KERNELS.md has the figures).

    groups: of a block of K (`layout.BlockLayout`). With zeros too, a program keeps the most sums in registers.
    splits: chunks of K; several need one more set of sums. arch: "sm_90", "gfx942"; "" where nothing is known.
    """
    is_heavy = groups > 1 and has_zeros
    if m <= 16:
        is_wide = kind.startswith("fp8") or (kind == "int8" and is_heavy)
        return LinearConfig(16, 64, 4, 4) if is_wide else LinearConfig(16, 32, 2, 4)
    is_int4_heavy = kind == "int4" and is_heavy
    if m <= 32 or (m <= MANY_ROWS and is_int4_heavy):
        is_wide = kind.startswith("fp8") or is_int4_heavy
        if is_int4_heavy and _is_amd(arch):
            return LinearConfig(16, 64, 4, 3)
        return LinearConfig(32, 64, 4, 3) if is_wide else LinearConfig(32, 32, 2, 4)
    if m <= MANY_ROWS:
        return LinearConfig(64, 64, 4, 3)
    many = LinearConfig(128, 128, 8, 2 if _is_amd(arch) else 3, split_programs=0, programs_per_sm=1)
    if kind in ("int4", "int8"):
        return _many_packed(many, kind, groups, has_zeros, splits, arch)
    if arch in WITH_TMA:
        many = replace(many, has_tma=True)
    if kind == "fp8_block":
        return replace(many, block_m=32 if arch == "sm_100" and splits > 1 else 64)
    return replace(many, block_m=256) if splits == 1 and (kind, arch) in LARGEST_TILES else many


def _many_packed(many: LinearConfig, kind: str, groups: int, has_zeros: bool, splits: int, arch: str) -> LinearConfig:
    """Sums of a group, of a chunk and of all of K are three sets of registers, and warp groups need fewest besides; on
    sm_100 a tile of 128 x 128 unpacked int4 planes is more than tensor memory holds."""
    is_heavy = groups > 1 and has_zeros
    if arch not in WITH_TMA:
        return replace(many, block_m=64, block_n=64, num_warps=4)
    if arch == "sm_100":
        is_large = kind == "int8" and not has_zeros
    else:
        is_large = kind == "int4" and not is_heavy and (splits == 1 or (groups == 1 and not has_zeros))
    return many if is_large else replace(many, block_m=64)


def _is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def for_heads(
    config: LinearConfig, kind: str, head_dim: int, *, has_head_norm: bool = False, arch: str = ""
) -> LinearConfig:
    """`config` where a tile must be one head: 16 rows of the weight per warp, and as many rows of x as registers
    allow besides the two halves of a head."""
    is_small = kind == "int4" or has_head_norm or (kind == "fp8_block" and arch == "sm_100")
    most = (4096 if is_small else 8192) // head_dim
    if _is_amd(arch):  # a persistent program's addresses are scalars, of which a head's epilogue leaves too few
        most = 2048 // head_dim if kind == "int4" else 8192 // head_dim
        config = replace(config, programs_per_sm=0)
    warps = max(1, min(8, head_dim // 16))
    return replace(config, block_n=head_dim, block_m=max(16, min(config.block_m, most, 64)), num_warps=warps)
