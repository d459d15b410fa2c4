"""Op: rotary position embedding. `reference.py` defines its meaning.

On the GPU, `triton.py` also norms the heads of q and k and writes K and V into the KV blocks; `triton_math.py` holds
the device functions that the epilogue of the qkv product shares with it.
"""

from headrace.kernels.rope.reference import RopeTable, rope, rope_table

__all__ = ["RopeTable", "rope", "rope_table"]
