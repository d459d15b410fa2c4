"""Where every weight lies in a packed matrix: what `pack.py` writes and the Triton kernels read.

Words of 16 bits hold 4 nibbles (int4) or 2 bytes (int8): plane i of word w, in a block of `block_k` columns, is column
i * block_k / planes + w of that block. So the activations that belong to a plane lie side by side, a plane comes out of
a pair of words with one lop3, and a group of columns is some whole planes of a block (or one group spans a block).
Blocks of TILE rows x block_k columns lie in one piece, blocks of a tile one after the other: a program streams.
Imports nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # rows of a stored tile; kernels take a part of a tile or several
GATE_ROWS = 8  # a gated matrix alternates 8 rows of gate, 8 of up: one thread of an MMA holds both rows of a pair
PLANES = {"int4": 4, "int8": 2}
GROUP_SIZES = (16, 32, 64, 128)  # larger ones, multiples of 128, are stored as groups of 128

# Columns whose squares are summed where they are computed (`epilogue.NextNorm`); the fewest rows of a tile there.
SQUARES_COLUMNS = 32

# Chunks of K that are summed on their own and then added in order: programs of their own where rows are few. Enough
# of them for every SM of a large GPU to hold several programs of 32 rows; two blocks a chunk at least.
SPLIT_ROWS = 32
SPLIT_PROGRAMS = 384
MAX_SPLITS = 8


@dataclass(frozen=True)
class BlockLayout:
    """block_k: columns per block. planes: per word. groups: of one block, 1 where a group is a block or more."""

    block_k: int
    planes: int
    groups: int

    @property
    def words(self) -> int:
        """Words per row of a block."""
        return self.block_k // self.planes


def block_layout(kind: str, group_size: int) -> BlockLayout:
    """The layout of groupwise weights. Raises ValueError for a group size that the kernels cannot take."""
    if group_size not in GROUP_SIZES and (group_size <= 0 or group_size % 128):
        raise ValueError(f"groups of {group_size} weights: the kernels take {GROUP_SIZES} and multiples of 128")
    planes = PLANES[kind]
    block_k = min(128, planes * group_size)
    return BlockLayout(block_k, planes, max(1, block_k // group_size))


def dense_block_k(item_bytes: int, k: int) -> int:
    """Columns per block where operands go to the matrix unit as they lie: 128 bytes, less for narrow matrices."""
    block = 128 // item_bytes
    while block > 32 and block > k:
        block //= 2
    return block


def num_splits(n: int, k: int, block_k: int) -> int:
    """Chunks of K: a function of the matrix alone, so that a row's sum never depends on its neighbours."""
    blocks = -(-k // block_k)
    programs = -(-n // SPLIT_ROWS)
    splits = 1
    while splits < MAX_SPLITS and programs * splits < SPLIT_PROGRAMS and blocks >= 4 * splits:
        splits *= 2
    while splits > 1 and -(-blocks // splits) * (splits - 1) >= blocks:  # no empty chunk
        splits -= 1
    return splits
