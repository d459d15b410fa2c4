"""Puts a planned load straight into the engine, in this process: no gRPC, no second process, no text.

Used by bench/engine.py and bench/overhead.py. The engine is built as a server's engine process builds it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from headrace.engine.engine import Engine
from headrace.engine.types import SamplingParams, SequenceRequest
from headrace.models.load import load_front
from headrace.server import engine_main, frames
from headrace.server.cli.load import PlannedRequest, Record, Workload
from headrace.server.cli.progress import fetch_model
from headrace.server.config import ServerConfig


@dataclass(frozen=True)
class BuiltEngine:
    """A loaded engine. `load_seconds`: from the file to ready."""

    engine: Engine
    backend: str
    name: str
    vocab_size: int
    load_seconds: float


def build(model: str | None, threads: int) -> BuiltEngine:
    """The engine that `headrace serve` would run with its defaults."""
    config = ServerConfig(model=model or ServerConfig.model, num_threads=threads)
    path = fetch_model(config.model)
    begin = time.monotonic()
    load = frames.Load(
        path=str(path),
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_live_sequences=config.max_live_sequences,
        max_live_tokens=config.max_live_tokens,
        num_threads=config.num_threads,
        enable_prefix_cache=config.enable_prefix_cache,
    )
    built = engine_main.build_engine(load, lambda _: None)
    seconds = time.monotonic() - begin
    return BuiltEngine(built.engine, built.backend, config.name, load_front(path).info.vocab_size, seconds)


class EngineLoad:
    """Runs workloads on one engine, one after the other."""

    def __init__(self, engine: Engine) -> None:
        self.step_seconds = 0.0  # in Engine.step
        self._engine = engine
        self._next_id = 1

    @property
    def native_seconds(self) -> float | None:
        """Of those, in C++; None with a back end that does not say."""
        return getattr(self._engine._executor, "native_seconds", None)

    def run(self, workload: Workload, planned: Sequence[PlannedRequest]) -> list[Record]:
        """Sends everything and returns what was seen, in the order of the plan."""
        start = time.monotonic()
        waiting, live, records = deque(planned), dict[int, Record](), list[Record]()
        while waiting or live:
            while waiting and self._is_due(waiting[0], workload, len(live), start):
                record = self._add(waiting.popleft(), start, live)
                records.append(record)
            if not live:  # an open loop between two arrivals
                time.sleep(max(0.0, start + (waiting[0].due or 0.0) - time.monotonic()))
                continue
            self._step(live)
        return records

    @staticmethod
    def _is_due(request: PlannedRequest, workload: Workload, num_live: int, start: float) -> bool:
        if request.due is None:
            return num_live < workload.concurrency
        return time.monotonic() >= start + request.due

    def _add(self, request: PlannedRequest, start: float, live: dict[int, Record]) -> Record:
        now = time.monotonic()
        record = Record(now if request.due is None else start + request.due, len(request.prompt))
        sampling = SamplingParams(max_tokens=request.max_tokens, temperature=0.0)
        self._engine.add(SequenceRequest(self._next_id, list(request.prompt), sampling, arrival=now))
        live[self._next_id] = record
        self._next_id += 1
        return record

    def _step(self, live: dict[int, Record]) -> None:
        begin = time.monotonic()
        outputs = self._engine.step()
        now = time.monotonic()
        self.step_seconds += now - begin
        for output in outputs:
            live[output.id].add(now, len(output.tokens))
            if output.finish is not None:
                live.pop(output.id)
