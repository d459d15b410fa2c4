"""The peers bench: what to run, where, and what becomes of the results. Started by `run.py`.

Without a mode it fills the tables of docs/PERFORMANCE.md and README.md. Results go to bench/results/peers*.jsonl, plots
to docs; --no-save prints only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from headrace.models.load import load_front
from headrace.server.cli import hardware
from headrace.server.cli.progress import fetch_model
from headrace.server.config import ServerConfig

from bench.peers import curves, install, model_1b, plots, quality, report, rows, table
from bench.peers.offline import Place

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "bench" / "results", ROOT / "docs" / "PERFORMANCE.md"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "performance.svg"  # on AVX2, which the targets are for


def main() -> None:
    options = _parse()
    _commit()
    gguf = Path(fetch_model(options.model))
    if options.install:
        _install(gguf)
        return
    for isa in ("avx2", "native") if options.isa == "both" else (options.isa,):
        place = Place(_cpus(options.threads), isa)
        begin = time.monotonic()
        print(f"cores {place.cpus}, {place.threads} threads, {isa} instructions", flush=True)
        if options.curves:
            _save(options, curves.run(gguf, place, options.rounds), "peers_curves", curves.KEY, curves.sections, isa)
        elif options.model_1b:
            _save(options, model_1b.run(place, options.rounds), "peers_1b", ("name", "isa"), model_1b.sections, isa)
        elif options.quality:
            _save(options, quality.run(gguf, place), "peers_quality", ("name", "isa"), quality.sections, isa)
        else:
            _table(options, gguf, place)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds; a ratio is their median")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this row only (may be repeated)")
    parser.add_argument(
        "--isa", choices=("avx2", "native", "both"), default="both", help="instruction sets to compare in"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="cores and threads for everybody; 0: as a server chooses"
    )
    parser.add_argument("--model", default=ServerConfig.model, help="as for headrace serve, a GGUF file")
    parser.add_argument("--no-save", action="store_true", help="print only; leave bench/results and docs as they are")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--curves", action="store_true", help="over streams, context and threads, beside llama.cpp")
    mode.add_argument("--model-1b", action="store_true", help="a random Llama of 1.1 B parameters in Q4_K_M")
    mode.add_argument("--quality", action="store_true", help="perplexity, and divergence from the float32 reference")
    mode.add_argument("--install", action="store_true", help="get every peer into the cache, and measure nothing")
    options = parser.parse_args()
    names = {row.name for row in rows.ROWS}
    if unknown := [name for name in options.only if name not in names]:
        parser.error(f"no row is called {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    if options.isa == "both" and not any(name.startswith("avx512") for name in hardware.detect_machine().simd):
        options.isa = "native"  # this machine has nothing to be held back from
    return options


def _cpus(threads: int) -> tuple[int, ...]:
    """The cores for everybody: the first ones that this process may use."""
    count = threads or hardware.choose_threads(hardware.detect_machine()).count
    return tuple(sorted(os.sched_getaffinity(0))[:count])


def _install(gguf: Path) -> None:
    samples = table.Samples()
    for name, get in (
        ("llama.cpp native", lambda: install.llama_cpp("native")),
        ("llama.cpp avx2", lambda: install.llama_cpp("avx2")),
        (rows.Q4_0, lambda: install.q4_0(gguf)),
        (rows.ORT, lambda: install.onnxruntime(gguf)),
        (rows.OPENVINO, install.openvino),
        (rows.CT2, lambda: install.ctranslate2(gguf)),
        (rows.VLLM, install.vllm),
        ("llama.cpp logits", install.llama_python),
    ):
        if samples.attempt(name, get) is not None:
            print(f"{name}: ready", flush=True)


def _table(options: argparse.Namespace, gguf: Path, place: Place) -> None:
    names = frozenset(options.only or [row.name for row in rows.ROWS])
    plan = table.Plan(gguf, place, options.rounds, names, load_front(gguf).info.vocab_size)
    samples = table.measure(plan)
    facts = {**_facts(place), "model": gguf.name}
    facts["versions"] = {**hardware.versions(), **samples.versions}
    if samples.rounds.get("pss"):
        samples.notes["pss_mb"] = table.pss_note(samples)
    facts["notes"] = samples.notes
    lines = []
    for row in rows.ROWS:
        if row.name in names:
            outcome = rows.judge(row, samples.rounds.get(row.measure, []), samples.absent)
            lines.append({"work": row.work, **report.to_json(outcome, facts)})
    print("\n".join([*report.table(lines), *report.reasons(lines)]), flush=True)
    if options.no_save:
        return
    report.write_lines(RESULTS / "peers.jsonl", lines)
    every = _in_order(report.read_lines(RESULTS / "peers.jsonl", place.isa))
    _write_page(f"table {place.isa}", _table_section(every))
    is_target = place.isa == "avx2" or not any("avx512" in name for name in facts["machine"]["simd"])
    if is_target:
        README.write_text(report.replace_between(README.read_text(), "table", ["", *report.table(every), ""]))
    (PLOT if is_target else PLOT.with_stem(f"performance-{place.isa}")).write_text(
        plots.bars(every, f"Headrace beside its peers, {gguf.stem}, {place.threads} cores, {place.isa} instructions")
    )


def _in_order(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    order = {row.name: number for number, row in enumerate(rows.ROWS)}
    return sorted((line for line in lines if line["name"] in order), key=lambda line: order[line["name"]])


def _table_section(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The table with what it was measured on, and who is absent and why."""
    section = [*report.table(lines), ""]
    commits = sorted({line["commit"] for line in lines})
    machine = lines[-1]["machine"]
    rounds = sorted({line["rounds"] for line in lines if line["rounds"]})
    section.append(
        f"{machine['cpu']}, {lines[-1]['threads']} cores; "
        f"backend {lines[-1]['notes'].get('backend', 'of the server')}; "
        f"{'/'.join(map(str, rounds)) or 'no'} interleaved rounds; commit {', '.join(commits)}."
    )
    versions = {name: version for line in lines for name, version in line["versions"].items()}
    section.append("Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".")
    return section + [""] * bool(report.reasons(lines)) + [f"- {reason}" for reason in report.reasons(lines)]


def _save(
    options: argparse.Namespace, lines: list[dict[str, Any]], stem: str, key: Sequence[str], sections: Any, isa: str
) -> None:
    """Prints what a mode measured; saves its lines, its part of the page and its plots."""
    facts = _facts(Place(_cpus(options.threads), isa))
    lines = [{**line, **facts, "versions": {**hardware.versions(), **line.pop("versions", {})}} for line in lines]
    section, plots = sections(lines)
    print("\n".join(section), flush=True)
    if options.no_save:
        return
    report.write_lines(RESULTS / f"{stem}.jsonl", lines, key)
    _write_page(f"{stem.removeprefix('peers_')} {isa}", section)
    for name, svg in plots.items():
        (PLOT.parent / name).write_text(svg)


def _write_page(name: str, lines: Sequence[str]) -> None:
    PAGE.write_text(report.replace_between(PAGE.read_text(), name, ["", *lines, ""]))


@cache
def _commit() -> str:
    """The commit that is measured, found before the first results make the working tree differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _facts(place: Place) -> dict[str, Any]:
    return {
        "isa": place.isa,
        "threads": place.threads,
        "commit": _commit(),
        "machine": asdict(hardware.detect_machine()),
    }
