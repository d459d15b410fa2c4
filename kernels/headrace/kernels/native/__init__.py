"""The native back end: C++ ops of kernels/csrc behind a plain C ABI, called through ctypes. Imports no torch."""
