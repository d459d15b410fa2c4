"""Op: move whole KV blocks: within the caches, and to and from host memory when a sequence is preempted or resumed.

A cache is a tensor [num_blocks, ...], dense from the second dimension on; a layer has two of them, k and v. All caches
of a model are moved together: a block number means the same positions of the same sequence in each of them.
`reference.py` defines the meaning; `triton.py` is the GPU's.
"""

from headrace.kernels.kv_blocks.reference import copy_blocks, gather_blocks, scatter_blocks

__all__ = ["copy_blocks", "gather_blocks", "scatter_blocks"]
