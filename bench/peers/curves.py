"""`run.py --curves`: rates over streams, context and threads, ours beside llama.cpp. Called by `main.py`.

Streams 1, 2, 4 ... 256 at a prompt of 128; context 128 ... 8,192 at one stream; both again on one core for the cost of
a token over threads. A line holds one point: name, x, ours, theirs (tokens per second), ratio.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from headrace.models.load import load_front

from bench.peers import offline, plots
from bench.peers.offline import Contender, Place
from bench.peers.table import Samples, prompts

KEY = ("name", "x", "isa", "threads_used")
_STREAMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
_PROMPT, _NEW = 128, 32
_LONG_NEW = 32
_TITLES = {"streams": "decode over streams, prompts of 128", "context": "decode of one stream over context"}


def run(gguf: Path, place: Place) -> list[dict[str, Any]]:
    """All points. A peer that is absent leaves `theirs` empty, with the reason in `absent`."""
    info = load_front(gguf).info
    samples = Samples()
    lines = []
    for threads in sorted({1, place.threads}):
        here = replace(place, cpus=place.cpus[:threads])
        streams = _STREAMS if threads == place.threads else _STREAMS[:6]
        contexts = [c for c in _CONTEXTS if c <= info.context_length] if threads == place.threads else []
        llama = samples.attempt("llama.cpp Q4_1", lambda p=here: offline.LlamaCpp(gguf, p))  # type: ignore[misc]
        room = max(streams) * (_PROMPT + 2 * _NEW + 256)
        ours = offline.headrace(gguf, here, kv_tokens=max(room, info.context_length), max_num_seqs=max(streams))
        try:
            for count in streams:
                asked = prompts(f"curves/{count}/{threads}", count, _PROMPT, info.vocab_size)
                lines.append(_point("streams", count, asked, _NEW, ours, llama, samples))
            for context in contexts:
                length = context - _LONG_NEW - 4 if context == info.context_length else context
                asked = prompts(f"context/{context}", 1, length, info.vocab_size)
                lines.append(_point("context", context, asked, _LONG_NEW, ours, llama, samples))
        finally:
            ours.close()
        for line in lines:
            line.setdefault("threads_used", threads)
    for line in lines:
        line["absent"], line["versions"] = dict(samples.absent), dict(ours.versions)
    return lines


def _point(
    name: str,
    x: int,
    asked: Sequence[Sequence[int]],
    new: int,
    ours: Contender,
    llama: Contender | None,
    samples: Samples,
) -> dict[str, Any]:
    mine = samples.attempt(f"headrace at {x} {name}", lambda: ours.decode(asked, new))
    theirs = None
    if llama is not None:
        theirs = samples.attempt(f"llama.cpp at {x} {name}", lambda: llama.decode(asked, new))
    line = {
        "name": name,
        "x": x,
        "ours": mine and round(mine, 2),
        "theirs": theirs and round(theirs, 2),
        "ratio": round(mine / theirs, 3) if mine and theirs else None,
        "step_ms": round(1000 * len(asked) / mine, 2) if mine else None,
        "unit": "tok/s",
    }
    print(f"  {line}", flush=True)
    return line


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
            if rate < before
        ]
    return found or ["No cliff: each doubling of streams gave at least the throughput before it."]


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
