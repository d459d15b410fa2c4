"""`python -m tests.gpu.aot [PATTERN ...] [--targets cuda:90,...] [--check] [--update]`: compile cases and print them.

For whoever writes a kernel: PATTERN is a part of a case's name, or a shell pattern. --check compares with the baseline
and exits 1 where something is worse; --update makes what was compiled the baseline.
"""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch

from tests.gpu.aot import gate, report
from tests.gpu.aot.cases import all_cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.aot", description=__doc__)
    parser.add_argument("patterns", nargs="*", metavar="PATTERN", help="cases by part of their name; default: all")
    parser.add_argument(
        "--targets", default="", help="of cuda:80, cuda:89, cuda:90, cuda:100, hip:gfx942; default: all"
    )
    parser.add_argument("--quick", action="store_true", help="the cases of make gpu-gates ARGS=--quick")
    parser.add_argument("--check", action="store_true", help="compare with the baseline")
    parser.add_argument("--update", action="store_true", help="make the result the baseline")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    patterns = [pattern if "*" in pattern else f"*{pattern}*" for pattern in args.patterns] or ["*"]
    names = [
        name
        for name, case in all_cases().items()
        if any(fnmatch(name, pattern) for pattern in patterns) and (case.is_quick or not args.quick)
    ]
    targets = [target.name for target in gate.targets_of(args.targets)]
    rows = []
    for target in targets:
        new = gate.compile_cases(names, [target], args.processes)
        print(report.table(new), flush=True)
        if args.update:  # target by target: what a run got done is kept
            gate.write_baseline(new, targets=[target], keep_others=bool(args.patterns or args.quick))
        rows += new
    if not args.check:
        return 0
    found = gate.problems(rows)
    print("\n".join(found))
    print(f"{len(rows)} kernels compiled, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
