"""What the benches share: their options, the last line in JSON with machine, versions and commit, and where it is kept.

The load itself and its numbers are `headrace.server.cli.load`, which `headrace bench` uses too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from headrace.server.cli import hardware
from headrace.server.cli.load import Lengths, Slo, Workload

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", help="as for headrace serve; default: the default model")
    parser.add_argument("--threads", type=int, default=0, help="threads that compute; 0: as headrace doctor says")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--concurrency", type=int, default=16, help="streams kept busy (closed loop)")
    parser.add_argument("--rate", type=float, help="requests per second (open loop)")
    parser.add_argument("--arrival", choices=("poisson", "constant"), default="poisson")
    parser.add_argument("--prompt-tokens", type=Lengths.parse, default=Lengths.parse("64"), help="or uniform:16,256")
    parser.add_argument("--output-tokens", type=Lengths.parse, default=Lengths.parse("32"), help="or lognormal:128,0.5")
    parser.add_argument("--slo-ttft-ms", type=float)
    parser.add_argument("--slo-tpot-ms", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="append the JSON line to bench/results/")
    return parser


def workload_of(options: argparse.Namespace) -> Workload:
    """The load that was asked for."""
    return Workload(
        num_requests=options.requests,
        concurrency=options.concurrency,
        rate=options.rate,
        arrival=options.arrival,
        prompt=options.prompt_tokens,
        output=options.output_tokens,
        seed=options.seed,
    )


def slo_of(options: argparse.Namespace) -> Slo:
    """The objective that goodput counts."""
    return Slo(options.slo_ttft_ms, options.slo_tpot_ms)


def threads_of(options: argparse.Namespace) -> int:
    """Threads that compute: what was asked for, or what a server would choose."""
    return int(options.threads) or hardware.choose_threads(hardware.detect_machine()).count


def finish(bench: str, result: dict[str, Any], *, save: bool) -> None:
    """Prints the last line; with `save`, appends it to bench/results/NAME.jsonl."""
    machine = hardware.detect_machine()
    line = {
        "bench": bench,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": hardware.versions(),
        "machine": asdict(machine),
        **result,
    }
    text = json.dumps(line)
    if save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{bench}.jsonl").open("a") as results:
            results.write(text + "\n")
    print(text)


def _commit() -> str:
    """The commit that is measured, marked where the working tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
