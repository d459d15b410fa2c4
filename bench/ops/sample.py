"""Microseconds per row of the op `sample`: every filter, two vocabularies, native kernels and the numpy reference.

    python bench/ops/sample.py [--isa avx2] [--repeats 200] [--reference]

Prints one JSON object a line: the median over repeats, less what a call with a vocabulary of one token costs (ctypes).
Logits are random with the spread of a language model's (normal, standard deviation 3, a few dozen likely tokens on
top); each repeat samples another of 8 rows twice and times the second, so that it comes from the L2 cache as it does
after the output head. Called by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
from headrace.kernels import sample as reference
from headrace.kernels.batch import RowSampling
from headrace.kernels.native import sampling

NUM_ROWS = 8
VOCAB_SIZES = (49_152, 151_936)
SEEN = list(range(0, 4096, 4))

CASES: dict[str, RowSampling] = {
    "greedy": RowSampling(),
    "temperature": RowSampling(temperature=1.0, seed=1),
    "top_k_50": RowSampling(temperature=1.0, seed=1, top_k=50),
    "top_k_5000": RowSampling(temperature=1.0, seed=1, top_k=5000),
    "top_p_0.9": RowSampling(temperature=1.0, seed=1, top_p=0.9),
    "top_p_0.9_hot": RowSampling(temperature=5.0, seed=1, top_p=0.9),
    "top_k_50_top_p_0.9": RowSampling(temperature=1.0, seed=1, top_k=50, top_p=0.9),
    "min_p_0.05": RowSampling(temperature=1.0, seed=1, min_p=0.05),
    "penalties": RowSampling(repetition_penalty=1.1, frequency_penalty=0.2, prompt_ids=SEEN, output_ids=SEEN[:64]),
    "greedy_logprobs_5": RowSampling(num_logprobs=5),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isa", help="default: the best that this CPU runs")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--reference", action="store_true", help="time the numpy reference as well")
    options = parser.parse_args()
    one = sampling.encode([RowSampling()], 1)
    overhead = microseconds(lambda i: sampling.run(np.zeros((1, 1), np.float32), one, options.isa), options.repeats)
    for vocab_size in VOCAB_SIZES:
        logits = make_logits(vocab_size)
        for name, row in CASES.items():
            rows = [logits[i : i + 1] for i in range(NUM_ROWS)]
            arrays = sampling.encode([row], vocab_size)

            def native(i: int, rows: list[np.ndarray] = rows, arrays: sampling.SamplingArrays = arrays) -> None:
                sampling.run(rows[i], arrays, options.isa)

            line: dict[str, object] = {"op": "sample", "case": name, "vocab_size": vocab_size}
            line["us"] = round(microseconds(native, options.repeats) - overhead, 1)
            if options.reference:

                def numpy(i: int, rows: list[np.ndarray] = rows, row: RowSampling = row) -> None:
                    reference.sample(rows[i], (row,))

                line["reference_us"] = round(microseconds(numpy, 20), 1)
            print(json.dumps(line), flush=True)


def make_logits(vocab_size: int) -> np.ndarray:
    """float32 [NUM_ROWS, vocab_size]."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((NUM_ROWS, vocab_size)) * 3).astype(np.float32)
    for row in logits:
        row[rng.choice(vocab_size, 40, replace=False)] += np.linspace(4, 14, 40, dtype=np.float32)
    return logits


def microseconds(run: Callable[[int], None], repeats: int) -> float:
    """The median of one call; each row is touched first, as the output head has just written it."""
    times = []
    for repeat in range(repeats + 5):
        run(repeat % NUM_ROWS)
        start = time.perf_counter()
        run(repeat % NUM_ROWS)
        times.append(time.perf_counter() - start)
    return statistics.median(times[5:]) * 1e6


if __name__ == "__main__":
    main()
