"""Linear layers of SmolLM2-135M: GB/s of weights at one row, beside what the machine can read; GMAC/s at more rows.

One row streams weights that are in no cache (more than 64 MB by turns), on all threads. More rows run on one core, the
weights by turns too, in seconds of that core. Prints a table; `--isa` compares instruction sets. Rates are the best of
the rounds, which are interleaved: what the code can do, not what a busy machine gives.

    python bench/ops/linear.py --isa avx2 avx512vnni --rows 1 4 32
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from headrace.kernels.native import library, linear_ops
from headrace.kernels.native.matrix import MatrixStruct, PackedMatrix, aligned_bytes, pack_matrix
from headrace.kernels.quant import QuantKind, QuantTensor

COLD_BYTES = 80e6  # more than the last-level caches of this class of machine hold for one core


@dataclass(frozen=True)
class Case:
    """One layer: kind int4 has zeros (Q4_1), int8 has none (Q8_0); bits are those of the activations."""

    name: str
    rows: int
    cols: int
    kind: QuantKind = "int4"
    bits: int = 8
    is_gated: bool = False


CASES = (
    Case("qkv", 960, 576),
    Case("o", 576, 576),
    Case("gateup", 3072, 576, is_gated=True),
    Case("down", 576, 1536),
    Case("head", 49152, 576, "int8", 16),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=[library.info().isa], help="or all")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 256])
    parser.add_argument("--cases", nargs="+", default=[case.name for case in CASES])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of one row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", action="store_true", help="one matrix, so that weights come from the caches")
    options = parser.parse_args()
    isas = library.info().usable if options.isa == ["all"] else options.isa
    limit = best(read_rate(options.threads), options.rounds)
    print(f"read bandwidth, {options.threads} threads: {limit:.1f} GB/s")
    print(f"{'layer':8}{'isa':12}" + "".join(f"{'M=' + str(rows):>9}" for rows in options.rows))
    print(f"{'':20}" + "".join(f"{'GB/s' if rows == 1 else 'GMAC/s':>9}" for rows in options.rows))
    for case in CASES:
        if case.name not in options.cases:
            continue
        matrices = make(case, 1 if options.warm else 0)
        runs = {(isa, rows): run(case, matrices, isa, rows, options) for isa in isas for rows in options.rows}
        rates = dict.fromkeys(runs, 0.0)
        for _ in range(options.rounds):
            for key, measure in runs.items():
                rates[key] = max(rates[key], measure())
        for isa in isas:
            print(f"{case.name:8}{isa:12}" + "".join(f"{rates[isa, rows]:9.1f}" for rows in options.rows), flush=True)


def best(measure: Callable[[], float], rounds: int) -> float:
    """The highest of some measurements."""
    return max(measure() for _ in range(rounds))


def make(case: Case, count: int) -> list[PackedMatrix]:
    """Copies of a random matrix, COLD_BYTES of them unless `count` says how many."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.001, 0.02, (case.rows, case.cols // 32)).astype(np.float16).astype(np.float32)
    packed = rng.integers(0, 256, (case.rows, case.cols // (2 if case.kind == "int4" else 1)), dtype=np.uint8)
    if case.kind == "int4":
        tensor = QuantTensor("int4", packed, scales, -(scales * np.float32(7)), 32)
    else:
        tensor = QuantTensor("int8", packed.view(np.int8), scales, None, 32)
    halves = [tensor]
    if case.is_gated:
        halves = [split(tensor, slice(0, case.rows // 2)), split(tensor, slice(case.rows // 2, None))]
    first = pack_matrix(halves, is_gated=case.is_gated)
    copies = [first]
    for _ in range((count or math.ceil(COLD_BYTES / first.data.nbytes)) - 1):
        data = aligned_bytes(first.data.nbytes)
        data[:] = first.data
        copies.append(PackedMatrix(first.spec, data))
    return copies


def split(tensor: QuantTensor, rows: slice) -> QuantTensor:
    """Some rows of a tensor."""
    zeros = None if tensor.zeros is None else tensor.zeros[rows]
    return QuantTensor(tensor.kind, tensor.packed[rows], tensor.scales[rows], zeros, tensor.group_size)


def run(
    case: Case, matrices: list[PackedMatrix], isa: str, rows: int, options: argparse.Namespace
) -> Callable[[], float]:
    """A measurement: GB/s of weights on all threads for one row, else GMAC/s on one thread."""
    lib = linear_ops.native()
    rng = np.random.default_rng(1)
    x = linear_ops.quantize(rng.standard_normal((rows, case.cols), dtype=np.float32), case.bits, isa)
    width = case.rows // 2 if case.is_gated else case.rows
    op = linear_ops.LinearStruct(num_rows=rows, epilogue=2 if case.is_gated else 0)
    op.activations, op.activations_bytes, op.bits = x.data.ctypes.data, x.data.nbytes, x.bits
    out = np.zeros((rows, width), np.float32)
    gated = linear_ops.empty_activations(rows, width, case.bits) if case.is_gated else None
    if gated is not None:
        op.gated, op.gated_bytes, op.gated_bits = gated.data.ctypes.data, gated.data.nbytes, gated.bits
    else:
        op.out, op.out_stride = out.ctypes.data, width
    structs = (MatrixStruct * len(matrices))(*(matrix.struct() for matrix in matrices))
    threads = options.threads if rows == 1 else 1
    weights = case.rows * case.cols * len(matrices)
    # About 20 ms a measurement.
    repeats = max(1, round(4e8 * threads / matrices[0].data.nbytes / len(matrices)) if rows == 1 else 0)
    if rows > 1 and weights * rows < 2e9:
        repeats = max(1, round(2e9 / (weights * rows)))
    used = len(matrices) if rows == 1 else max(1, min(len(matrices), round(4e9 / (case.rows * case.cols * rows))))

    def measure() -> float:
        seconds = ctypes.c_double()
        if lib.hr_linear_bench(isa.encode(), structs, used, ctypes.byref(op), threads, repeats, ctypes.byref(seconds)):
            raise ValueError(library.last_error())
        amount = matrices[0].data.nbytes if rows == 1 else case.rows * case.cols * rows
        del_keep = (x, out, gated)  # alive while C++ uses them
        assert del_keep
        return amount * used * repeats / seconds.value / 1e9

    return measure


def read_rate(threads: int) -> Callable[[], float]:
    """A measurement: GB/s at which all threads read memory that is in no cache."""
    lib = linear_ops.native()
    data = np.ones(int(4 * COLD_BYTES), np.uint8)

    def measure() -> float:
        seconds = ctypes.c_double()
        lib.hr_read_bench(data.ctypes.data, data.nbytes, threads, 1, ctypes.byref(seconds))
        return data.nbytes / seconds.value / 1e9

    return measure


if __name__ == "__main__":
    main()
