"""Floor 0: ops (arrays in, arrays out), the step program that strings them together, and its executors."""

import os

# torch's OpenMP threads spin for milliseconds at every barrier. Beside a busy neighbour that triples a step (125 ms
# against 47 ms, docs/LOG.md); alone it gains nothing. The runtime reads this when torch is loaded, so it stands here.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
