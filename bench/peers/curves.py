"""`run.py --curves`: rates over streams, context and threads, ours beside llama.cpp. Called by `main.py`.

Streams 1, 2, 4 ... 256 at a prompt of 128; context 128 ... 8,192 at one stream; both again on one core for the cost of
a token over threads. A line holds one point: name, x, ours, theirs (tokens per second), ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from headrace.models.load import load_front

from bench.peers import offline, plots
from bench.peers.offline import Contender, Place
from bench.peers.table import Samples, prompts

KEY = ("name", "x", "isa", "threads_used")
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
_FEW = 6  # of them on one core
_PROMPT, _NEW = 128, 32
_SLACK = 32  # tokens that the driver allows for beyond what it times
_NOISE = 0.03
_TITLES = {"streams": "decode over streams, prompts of 128", "context": "decode of one stream over context"}


def run(gguf: Path, place: Place, rounds: int) -> list[dict[str, Any]]:
    """All points, each the median over the rounds. Without llama.cpp `theirs` is empty and `absent` says why."""
    info = load_front(gguf).info
    samples, lines = Samples(), list[dict[str, Any]]()
    for threads in sorted({1, place.threads}):
        here = replace(place, cpus=place.cpus[:threads])
        is_whole = threads == place.threads
        points = [("streams", count) for count in (_STREAMS if is_whole else _STREAMS[:_FEW])]
        points += [("context", size) for size in _CONTEXTS if is_whole and size <= info.context_length]
        llama = samples.attempt("llama.cpp Q4_1", lambda p=here: offline.LlamaCpp(gguf, p))  # type: ignore[misc]
        streams = max(x for name, x in points if name == "streams")
        room = max(streams * (_PROMPT + 2 * _NEW + streams), info.context_length)
        ours = offline.headrace(gguf, here, kv_tokens=room, max_num_seqs=streams)
        try:
            for number in range(rounds):
                for name, x in points:
                    count, length = (
                        (x, _PROMPT) if name == "streams" else (1, min(x, info.context_length - 2 * _NEW - _SLACK))
                    )
                    asked = prompts(f"{name}/{x}/{threads}/{number}", count, length, info.vocab_size)
                    _measure(f"{name}/{x}/{threads}", number, asked, {"headrace": ours, "llama.cpp": llama}, samples)
            lines += [_line(name, x, threads, x if name == "streams" else 1, samples) for name, x in points]
        finally:
            ours.close()
    return [{**line, "absent": dict(samples.absent), "versions": dict(ours.versions)} for line in lines]


def _measure(
    point: str,
    number: int,
    asked: Sequence[Sequence[int]],
    contenders: Mapping[str, Contender | None],
    samples: Samples,
) -> None:
    for name, contender in contenders.items():
        if contender is not None:
            value = samples.attempt(f"{name} at {point}", lambda c=contender: c.decode(asked, _NEW))  # type: ignore[misc]
            if value is not None:
                samples.add(point, number, name, value)
                print(f"  {point} {name}: {value:.1f} tokens/s", flush=True)


def _line(name: str, x: int, threads: int, streams: int, samples: Samples) -> dict[str, Any]:
    """One point. ratio: the median of the rounds' own."""
    found = samples.rounds[f"{name}/{x}/{threads}"]
    ours, theirs = ([sample[who] for sample in found if who in sample] for who in ("headrace", "llama.cpp"))
    both = [sample["headrace"] / sample["llama.cpp"] for sample in found if len(sample) == 2]
    rate = median(ours) if ours else None
    return {
        "name": name,
        "x": x,
        "threads_used": threads,
        "ours": rate and round(rate, 2),
        "theirs": round(median(theirs), 2) if theirs else None,
        "ratio": round(median(both), 3) if both else None,
        "step_ms": round(1000 * streams / rate, 2) if rate else None,
        "rounds": len(both),
        "unit": "tok/s",
    }


def sections(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Tables for the page, and the plots by file name."""
    section, charts, isa = [], {}, lines[0]["isa"]
    for name, title in _TITLES.items():
        for threads in sorted({line["threads_used"] for line in lines}):
            chosen = [line for line in lines if line["name"] == name and line["threads_used"] == threads]
            if not chosen:
                continue
            section += [f"{title}, {threads} thread{'s' * (threads > 1)}:", ""]
            section += [f"| {name} | ours, tok/s | ms per step | llama.cpp, tok/s | ratio |", "|---|---|---|---|---|"]
            section += [
                f"| {line['x']:,} | {_text(line['ours'])} | {_text(line['step_ms'])} | {_text(line['theirs'])} "
                f"| {_text(line['ratio'])} |"
                for line in chosen
            ]
            section.append("")
        widest = [line for line in lines if line["name"] == name and line["threads_used"] == lines[-1]["threads_used"]]
        series = {
            who: [(line["x"], line[key]) for line in widest if line[key]]
            for who, key in (("headrace", "ours"), ("llama.cpp Q4_1", "theirs"))
        }
        charts[f"performance-{name}-{isa}.svg"] = plots.curve(series, f"{title}, {isa} instructions", name, "tokens/s")
    section += cliffs([line for line in lines if line["name"] == "streams"])
    return section, charts


def cliffs(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on where more streams gave fewer tokens per second than half as many did; one that says none did."""
    found = []
    for threads in sorted({line["threads_used"] for line in lines}):
        rates = sorted((line["x"], line["ours"]) for line in lines if line["threads_used"] == threads and line["ours"])
        found += [
            f"Cliff at {x} streams on {threads} threads: {rate:g} tokens/s after {before:g}."
            for (_, before), (x, rate) in pairwise(rates)
            if rate < before * (1 - _NOISE)
        ]
    return found or [
        f"No cliff: each doubling of streams gave at least the throughput before it (within {_NOISE:.0%} of noise)."
    ]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
