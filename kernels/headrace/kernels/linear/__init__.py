"""Op: matrix product with a weight, norms and epilogues fused on the GPU. `reference.py` defines its meaning.

`pack.py` lays weights out for the GPU's kernels (`PackedLinear`, and back with `unpack`); `quantize.py` makes the kinds
that no file holds; `triton.py` is the product on the GPU. Importing this package imports torch, never triton.
"""

from headrace.kernels.linear.pack import PackedLinear, pack, unpack
from headrace.kernels.linear.reference import linear

__all__ = ["PackedLinear", "linear", "pack", "unpack"]
