"""Compiles every kernel ahead of time, for GPUs that are not here, and judges the machine code.

- capture.py: records the launches of a host wrapper on tensors without storage, specialised exactly as on a GPU;
- targets.py: the GPUs and their limits;
- sass.py, amdgcn.py: what the machine code says about itself;
- row.py: one kernel on one target, as numbers;
- cases.py: the calls that are compiled, at the shapes of real models;
- gate.py: rows against the committed baseline;
- audit.py: one decode step of a model, launches and bytes counted;
- report.py: the table, and docs/KERNELS.md.

Run by tests/gpu/gates.py (`make gpu-gates`, `make gpu-report`) in processes of their own: a process that interprets
kernels cannot compile them.
"""
