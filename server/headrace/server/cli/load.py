"""Load for benches: what to send when, what was seen, and the numbers that follow. Knows neither gRPC nor the engine.

Used by `headrace bench`, bench/serve.py, bench/engine.py and bench/overhead.py, so that all measure the same thing.

Words: TTFT is the time from when a request was due to its first token; in an open loop that is its scheduled arrival,
so that a slow server cannot hide its queue. ITL is the time between consecutive messages of a stream. TPOT is the time
from the first to the last token divided by the tokens after the first. Goodput counts requests that kept the SLO, per
second.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

# Random prompts take ids from here up: below lie, in all vocabularies that we serve, control tokens and single bytes.
_FIRST_TOKEN = 300


@dataclass(frozen=True)
class Lengths:
    """A distribution of lengths in tokens, always at least 1."""

    kind: Literal["fixed", "uniform", "lognormal"]
    first: float  # the length; the least length; the median
    second: float = 0.0  # unused; the greatest length; sigma of the logarithm
    most: int = 1 << 20  # cuts the tail of a lognormal

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Reads "128", "uniform:16,256" or "lognormal:128,0.5" (median, sigma; a third number is the most)."""
        kind, _, rest = text.rpartition(":")
        try:
            numbers = [float(part) for part in rest.split(",")]
        except ValueError:
            numbers = []
        if not all(math.isfinite(number) for number in numbers):
            numbers = []
        if kind in ("", "fixed") and len(numbers) == 1 and numbers[0] >= 1:
            return cls("fixed", numbers[0])
        if kind == "uniform" and len(numbers) == 2 and 1 <= numbers[0] <= numbers[1]:
            return cls("uniform", numbers[0], numbers[1])
        if kind == "lognormal" and len(numbers) in (2, 3) and numbers[0] >= 1 and numbers[1] >= 0:
            return cls("lognormal", numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else 1 << 20)
        raise ValueError(f"{text!r} is no distribution: write 128, uniform:16,256 or lognormal:128,0.5[,1024]")

    def draw(self, rng: random.Random) -> int:
        """One length."""
        if self.kind == "fixed":
            return int(self.first)
        if self.kind == "uniform":
            return rng.randint(int(self.first), int(self.second))
        return max(1, min(self.most, round(rng.lognormvariate(math.log(self.first), self.second))))


@dataclass(frozen=True)
class Workload:
    """What to send. With a `rate` (requests per second) the loop is open; else `concurrency` streams are kept busy."""

    num_requests: int
    concurrency: int
    rate: float | None
    arrival: Literal["poisson", "constant"]
    prompt: Lengths
    output: Lengths
    seed: int

    def plan(self, vocab_size: int) -> list[PlannedRequest]:
        """The requests in order of their time: fresh random prompts, and the same ones for the same seed."""
        rng = random.Random(self.seed)
        due, planned = 0.0, []
        for _ in range(self.num_requests):
            prompt = rng.choices(range(min(_FIRST_TOKEN, vocab_size - 1), vocab_size), k=self.prompt.draw(rng))
            planned.append(PlannedRequest(due if self.rate else None, tuple(prompt), self.output.draw(rng)))
            if self.rate:
                due += rng.expovariate(self.rate) if self.arrival == "poisson" else 1 / self.rate
        return planned


@dataclass(frozen=True)
class PlannedRequest:
    """One request: when it is due (seconds from the start; None: as soon as a stream is free), and what it asks for."""

    due: float | None
    prompt: tuple[int, ...]
    max_tokens: int


@dataclass
class Record:
    """What was seen of one request. Times in seconds of one monotonic clock."""

    due: float
    num_prompt: int
    times: list[float] = field(default_factory=list)  # one per message
    counts: list[int] = field(default_factory=list)  # tokens in it
    error: str = ""

    def add(self, now: float, num_tokens: int) -> None:
        """A message came. One without tokens (a flush of text) does not count."""
        if num_tokens:
            self.times.append(now)
            self.counts.append(num_tokens)

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return sum(self.counts)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None where there is only one."""
        after = self.num_tokens - self.counts[0]
        return (self.times[-1] - self.times[0]) / after if after else None


@dataclass(frozen=True)
class Slo:
    """What a request must keep to count as good; None does not matter. Milliseconds."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def is_kept(self, record: Record) -> bool:
        """Whether the request was good."""
        if record.error or not record.times:
            return False
        if self.ttft_ms is not None and record.ttft * 1000 > self.ttft_ms:
            return False
        return self.tpot_ms is None or record.tpot is None or record.tpot * 1000 <= self.tpot_ms


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """None where there is nothing to say."""
        if not seconds:
            return None
        ordered = sorted(seconds)
        mean = sum(ordered) / len(ordered)
        ms = [round(1000 * x, 2) for x in (mean, *(_rank(ordered, q) for q in (0.5, 0.9, 0.99)), ordered[-1])]
        return cls(*ms)


@dataclass(frozen=True)
class Summary:
    """The numbers of one run; rates per second of the time from the first request due to the last token."""

    num_requests: int
    num_failed: int
    failures: dict[str, int]
    seconds: float
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    ttft_ms: Percentiles | None
    itl_ms: Percentiles | None
    tpot_ms: Percentiles | None
    e2e_ms: Percentiles | None
    goodput_per_second: float | None

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def summarise(records: Sequence[Record], slo: Slo) -> Summary:
    """All numbers of a run."""
    good = [record for record in records if record.times and not record.error]
    failures: dict[str, int] = {}
    for record in records:
        if record.error or not record.times:
            failures[record.error or "no token"] = failures.get(record.error or "no token", 0) + 1
    start = min((record.due for record in records), default=0.0)
    seconds = max((record.times[-1] for record in good), default=start) - start
    per_second = 1 / seconds if seconds else 0.0
    prompt, output = sum(r.num_prompt for r in good), sum(r.num_tokens for r in good)
    has_slo = slo != Slo()
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(good),
        failures=failures,
        seconds=round(seconds, 3),
        prompt_tokens=prompt,
        output_tokens=output,
        requests_per_second=round(len(good) * per_second, 3),
        output_tokens_per_second=round(output * per_second, 2),
        total_tokens_per_second=round((prompt + output) * per_second, 2),
        ttft_ms=Percentiles.of([r.ttft for r in good]),
        itl_ms=Percentiles.of([b - a for r in good for a, b in zip(r.times, r.times[1:], strict=False)]),
        tpot_ms=Percentiles.of([r.tpot for r in good if r.tpot is not None]),
        e2e_ms=Percentiles.of([r.times[-1] - r.due for r in good]),
        goodput_per_second=round(sum(map(slo.is_kept, records)) * per_second, 3) if has_slo else None,
    )


def _rank(ordered: Sequence[float], q: float) -> float:
    """The nearest-rank quantile of a sorted sequence."""
    return ordered[max(0, math.ceil(q * len(ordered)) - 1)]
