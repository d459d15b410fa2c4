"""`run.py --quality`: what speed costs. Perplexity, and how far next-token distributions are from float32's.

Ours (the executor that a server would choose) and llama.cpp on the same file and the same token windows, those of
tests/data/llama_cpp_perplexity.json, beside the torch reference in float32. Called by `main.py`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from headrace.kernels.torch_executor import TorchExecutor
from headrace.models.load import load_model

from bench.peers import install, offline, rows
from bench.peers.drivers.windows import window_logits
from bench.peers.offline import Place
from bench.peers.process import Driver
from bench.peers.table import Samples

_TOKENS = Path(__file__).resolve().parents[2] / "tests" / "data" / "llama_cpp_perplexity.json"
_MOST_PERPLEXITY_RATIO = 1.005  # of llama.cpp's on the same file
_DRIVERS = Path(__file__).with_name("drivers")
F32 = npt.NDArray[np.float32]


def run(gguf: Path, place: Place) -> list[dict[str, Any]]:
    """The lines quality_perplexity and quality_kl. A contender that cannot be had leaves its figures out."""
    recorded = json.loads(_TOKENS.read_text())
    width = recorded["window_tokens"]
    windows = [recorded["tokens"][i * width : (i + 1) * width] for i in range(recorded["windows"])]
    samples = Samples()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        for number, (name, logits) in enumerate(_contenders(gguf, place, samples).items()):
            out = Path(folder) / str(number)
            out.mkdir()
            if samples.attempt(name, lambda make=logits, to=out: make(windows, to)) is not None:  # type: ignore[misc]
                files[name] = out
        reference: list[tuple[float, int]] = []
        divergence: dict[str, list[tuple[float, int]]] = {name: [] for name in files}
        losses: dict[str, list[tuple[float, int]]] = {name: [] for name in files}
        for number, (window, expected) in enumerate(zip(windows, _reference(gguf, windows), strict=True)):
            reference.append((mean_loss(expected, window), len(window) - 1))
            for name, out in files.items():
                actual = np.load(out / f"{number}.npy")
                divergence[name].append((mean_divergence(expected, actual), len(window)))
                losses[name].append((mean_loss(actual, window), len(window) - 1))
        for name in files:
            figures[name] = {"perplexity": math.exp(_mean(losses[name])), "kl": _mean(divergence[name])}
    float32 = math.exp(_mean(reference))
    for name, values in figures.items():
        print(f"  {name}: perplexity {values['perplexity']:.4f}, KL {values['kl']:.6f} nats; float32 {float32:.4f}")
    return _lines(figures, float32, samples)


def mean_loss(logits: F32, tokens: Sequence[int]) -> float:
    """Mean negative log-likelihood of each token after the first, nats. logits: [tokens, vocabulary]."""
    logprobs = log_softmax(logits[:-1])
    return -float(logprobs[np.arange(len(tokens) - 1), tokens[1:]].mean())


def mean_divergence(reference: F32, other: F32) -> float:
    """Mean over the rows of KL(reference || other), nats, in float64."""
    total = 0.0
    for start in range(0, len(reference), 64):  # 64 rows of a large vocabulary in float64 are 25 MB
        p, q = log_softmax(reference[start : start + 64]), log_softmax(other[start : start + 64])
        total += float((np.exp(p) * (p - q)).sum())
    return total / len(reference)


def log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


def _contenders(gguf: Path, place: Place, samples: Samples) -> dict[str, Any]:
    """By name, a call that writes the logits of windows to files."""

    def ours(windows: list[list[int]], out: Path) -> dict[str, Any]:
        contender = offline.headrace(gguf, place)
        try:
            samples.versions.update(contender.versions)
            samples.notes["backend"] = contender.facts["backend"]
            return contender.logits(windows, out)
        finally:
            contender.close()

    def llama(model: Path, windows: list[list[int]], out: Path) -> dict[str, Any]:
        environment = {
            "LLAMA_CPP_LIB_PATH": str(install.llama_cpp(place.isa)),
            "PYTHONPATH": str(install.llama_source().parents[1]),
        }
        command = [install.llama_python().python, _DRIVERS / "drive_llama_logits.py", model, str(place.threads)]
        driver = Driver("llama.cpp logits", command, place.cpus, environment)
        try:
            samples.versions.update(driver.facts["versions"])
            return driver.call("logits", windows=windows, out=str(out))
        finally:
            driver.close()

    return {
        rows.OURS: ours,
        rows.Q4_1: lambda windows, out: llama(gguf, windows, out),
        rows.Q4_0: lambda windows, out: llama(install.q4_0(gguf), windows, out),
    }


def _reference(gguf: Path, windows: Sequence[list[int]]) -> Iterator[F32]:
    """Logits of each window by the torch reference on the dequantised weights, float32."""
    model = load_model(gguf)
    executor = TorchExecutor(model.program, model.weights, num_blocks=64, block_size=16)
    for window in windows:
        yield window_logits(executor, window)


def _mean(parts: Sequence[tuple[float, int]]) -> float:
    return sum(value * count for value, count in parts) / sum(count for _, count in parts)


def _lines(figures: Mapping[str, Mapping[str, float]], float32: float, samples: Samples) -> list[dict[str, Any]]:
    lines = []
    for name, measure, target in (
        ("quality_perplexity", "perplexity", _MOST_PERPLEXITY_RATIO),
        ("quality_kl", "kl", 1.0),
    ):
        values = {who: round(found[measure], 6) for who, found in figures.items()}
        ours, theirs = values.get(rows.OURS), values.get(rows.Q4_1)
        ratio = round(ours / theirs, 4) if ours is not None and theirs else None
        verdict = "absent" if ratio is None else "reached" if ratio <= target else "MISSED"
        lines.append(
            {
                "name": name,
                "ratio": ratio,
                "ours": ours,
                "theirs": theirs,
                "peer": rows.Q4_1,
                "target": target,
                "verdict": verdict,
                "rounds": 1,
                "all": values,
                "float32_perplexity": round(float32, 4),
                "absent": dict(samples.absent),
                "notes": dict(samples.notes),
                "versions": dict(samples.versions),
            }
        )
    return lines


def sections(lines: Sequence[Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """The part of the page, and no plots."""
    section = ["| | ours | llama.cpp Q4_1 | ratio | at most | verdict | of all |", "|---|---|---|---|---|---|---|"]
    for line in lines:
        every = ", ".join(f"{who} {value:g}" for who, value in line["all"].items())
        section.append(
            f"| {line['name']} | {line['ours']} | {line['theirs']} | {line['ratio']} | {line['target']} "
            f"| {line['verdict']} | {every} |"
        )
    backend = lines[0]["notes"].get("backend", "none")
    section += ["", f"Backend {backend}; the float32 reference has perplexity {lines[0]['float32_perplexity']}."]
    return section + [f"- ABSENT {peer}: {why}" for peer, why in lines[0]["absent"].items()], {}
