"""The GPU back end: a step program lowered to fused ops, run by Triton kernels, replayed from CUDA graphs.

Importing this package imports neither torch nor triton; `executor` does, where the back end was chosen.
"""
