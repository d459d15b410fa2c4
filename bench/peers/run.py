"""Ours beside the best peers, on this machine, by turns: `make bench-peers`, or `python bench/peers/run.py --help`.

A thin start, so that the script finds its package from anywhere; the work is in `main.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from bench.peers.main import main

    main()
