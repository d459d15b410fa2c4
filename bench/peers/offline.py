"""Decode and prefill without a server: ours and each peer in one shape. Called by `table.py`, `curves.py` and others.

A contender answers `decode(prompts, new)` and `prefill(prompt)` in tokens per second. Decode counts decode steps only:
every stream has its first token when the clock starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bench.peers import install
from bench.peers.process import Driver, PeerError, pinned, without_paths

_DRIVERS = Path(__file__).with_name("drivers")
_KV_TOKENS_PER_BLOCK = 16
# How each peer is held to AVX2 on a core that has more. llama.cpp has a build of its own for it.
AVX2_ENVIRONMENT = {
    "headrace": {"HEADRACE_NATIVE_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2"},
    "openvino": {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"},
    "ctranslate2": {"CT2_FORCE_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "vllm": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}


@dataclass(frozen=True)
class Place:
    """Where everything runs: the cores it is pinned to, one thread each, and the instruction set ("native", "avx2")."""

    cpus: tuple[int, ...]
    isa: str

    @property
    def threads(self) -> int:
        return len(self.cpus)

    def environment(self, peer: str) -> dict[str, str]:
        """Variables that hold a peer to the thread count and the instruction set."""
        restricted = AVX2_ENVIRONMENT.get(peer, {}) if self.isa == "avx2" else {}
        return {"OMP_NUM_THREADS": str(self.threads), **restricted}


class Contender(Protocol):
    """Ours or a peer."""

    @property
    def versions(self) -> Mapping[str, str]: ...

    def decode(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """Tokens per second of all streams in `new` decode steps after the prompts. Raises PeerError."""
        ...

    def prefill(self, prompt: Sequence[int]) -> float:
        """Prompt tokens per second to the first token. Raises PeerError."""
        ...

    def close(self) -> None: ...


class Driven:
    """A contender with a driver process (drivers/)."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.facts: dict[str, Any] = driver.facts

    @property
    def versions(self) -> Mapping[str, str]:
        versions: Mapping[str, str] = self.facts["versions"]
        return versions

    def decode(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        answer = self._driver.call("decode", prompts=prompts, new=new)
        return len(prompts) * float(answer["steps"]) / float(answer["seconds"])

    def prefill(self, prompt: Sequence[int]) -> float:
        return len(prompt) / float(self._driver.call("prefill", prompt=prompt)["seconds"])

    def greedy(self, prompt: Sequence[int], new: int) -> list[int]:
        """The model's tokens after a prompt."""
        tokens: list[int] = self._driver.call("greedy", prompt=prompt, new=new)["tokens"]
        return tokens

    def logits(self, windows: Sequence[Sequence[int]], out: Path) -> dict[str, Any]:
        """Writes the logits of each window to OUT/i.npy (ours only)."""
        return self._driver.call("logits", windows=windows, out=str(out))

    def close(self) -> None:
        self._driver.close()


class LlamaCpp:
    """llama.cpp by its own tools: llama-bench for one stream and for prefill, llama-batched-bench for several.

    They draw random tokens of their own; a run is a process, so nothing of it is left for the next.
    """

    def __init__(self, gguf: Path, place: Place) -> None:
        self._programs, self._gguf, self._place = install.llama_cpp(place.isa), gguf, place

    @property
    def versions(self) -> Mapping[str, str]:
        return {"llama.cpp": f"llama-cpp-python {install.LLAMA_VERSION}, {self._place.isa} build"}

    def decode(self, prompts: Sequence[Sequence[int]], new: int) -> float:
        """One stream: llama-bench tg at that depth. Several: batched-bench, whose -pps reads the prompt once and copies
        its KV to every stream, so that the decode is that of separate prompts."""
        prompt, streams = len(prompts[0]), len(prompts)
        if streams == 1:
            return self._bench("-p", "0", "-n", str(new), "-d", str(prompt))
        sizes = ["-npp", str(prompt), "-ntg", str(new), "-npl", str(streams), "-pps"]
        context = str(streams * (prompt + new + 1))
        options = ["-c", context, "-b", "2048", "-ub", "512", "--output-format", "jsonl"]
        return float(self._last_json("llama-batched-bench", [*options, *sizes])["speed_tg"])

    def prefill(self, prompt: Sequence[int]) -> float:
        return self._bench("-p", str(len(prompt)), "-n", "0")

    def close(self) -> None:
        """Nothing runs between two calls."""

    def _bench(self, *sizes: str) -> float:
        return float(self._last_json("llama-bench", ["-r", "1", "-o", "jsonl", *sizes])["avg_ts"])

    def _last_json(self, tool: str, options: Sequence[str]) -> dict[str, Any]:
        command = [str(self._programs / tool), "-m", str(self._gguf), "-t", str(self._place.threads), *options]
        if tool != "llama-bench":
            command += ["-tb", str(self._place.threads)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=600, preexec_fn=pinned(self._place.cpus)
            )
        except subprocess.TimeoutExpired as error:
            raise PeerError(f"{tool} did not end within {error.timeout:g} s") from error
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or not lines:
            words = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise PeerError(f"{tool} ended with {done.returncode}: {without_paths(words)[:200]}")
        result: dict[str, Any] = json.loads(lines[-1])
        return result


def headrace(model: Path, place: Place, *, kv_tokens: int = 0, max_num_seqs: int = 64) -> Driven:
    """Our engine with the executor that a server would choose. Raises PeerError."""
    blocks = -(-kv_tokens // _KV_TOKENS_PER_BLOCK) + 1 if kv_tokens else 0
    settings = ["--num-blocks", str(blocks), "--max-num-seqs", str(max_num_seqs)]
    settings += ["--max-num-batched-tokens", str(max(512, max_num_seqs))]
    command = [sys.executable, _DRIVERS / "drive_headrace.py", model, str(place.threads), *settings]
    return Driven(Driver("headrace", command, place.cpus, place.environment("headrace")))


def openvino(gguf: Path, place: Place) -> Driven:
    """Raises AbsentError or PeerError."""
    # Where bfloat16 is there it computes in it, and with dynamic quantisation in int8; an AVX2 core does neither.
    options = ["INFERENCE_PRECISION_HINT=f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE=0"] if place.isa == "avx2" else []
    command = [install.openvino().python, _DRIVERS / "drive_openvino.py", gguf, str(place.threads), *options]
    return Driven(Driver("openvino-genai", command, place.cpus, place.environment("openvino")))


def ctranslate2(gguf: Path, place: Place) -> Driven:
    """Raises AbsentError or PeerError."""
    environment, model = install.ctranslate2(gguf)
    command = [environment.python, _DRIVERS / "drive_ctranslate2.py", model, str(place.threads)]
    return Driven(Driver("ctranslate2", command, place.cpus, place.environment("ctranslate2")))


def onnxruntime(gguf: Path, place: Place) -> Driven:
    """Raises AbsentError or PeerError."""
    if place.isa == "avx2":
        raise install.AbsentError("onnxruntime has no setting that holds it to AVX2, so it is not compared here")
    environment, model = install.onnxruntime(gguf)
    command = [environment.python, _DRIVERS / "drive_onnxruntime.py", model, str(place.threads)]
    return Driven(Driver("onnxruntime-genai", command, place.cpus, place.environment("onnxruntime")))
