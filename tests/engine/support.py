"""Short ways to say things in the hand-calculated engine tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.integrity import check_integrity
from headrace.engine.scheduler import Scheduler, StepPlan
from headrace.engine.sequence import Sequence
from headrace.engine.types import FinishOutput, SamplingParams, SequenceOutput, SequenceRequest

from tests.engine.oracle import OracleExecutor


def config(**changes: int | bool) -> EngineConfig:
    """16 usable blocks of 4 tokens, 8 tokens a step, 4 sequences."""
    values: dict[str, int | bool] = {
        "num_blocks": 17,
        "max_model_len": 64,
        "block_size": 4,
        "max_num_batched_tokens": 8,
        "max_num_seqs": 4,
        "max_logit_rows": 4,
        "max_waiting_seqs": 8,
        "max_waiting_tokens": 200,
    }
    return EngineConfig(**{**values, **changes})  # type: ignore[arg-type]


def request(
    number: int,
    prompt: int | list[int],
    max_tokens: int = 8,
    *,
    salt: str = "",
    deadline: float | None = None,
    score: bool = False,
    arrival: float = 0.0,
    **sampling: object,
) -> SequenceRequest:
    """A prompt given as a length has token ids that no other sequence of the test has (up to 10 sequences)."""
    ids = [(number * 5 + i) % 50 for i in range(prompt)] if isinstance(prompt, int) else prompt
    params = SamplingParams(max_tokens=max_tokens, seed=number, **sampling)  # type: ignore[arg-type]
    return SequenceRequest(number, ids, params, salt, deadline, score, arrival)


@dataclass(frozen=True)
class Row:
    """A row of logits, used up."""

    token_id: int = 1
    logprob: float = -0.5
    top: tuple[tuple[int, float], ...] = ()
    is_finite: bool = True


class Steps:
    """A scheduler without an engine: every sequence's next token is 1."""

    def __init__(self, engine_config: EngineConfig) -> None:
        self.scheduler = Scheduler(engine_config)
        self.now = 0.0

    def add(self, *requests: SequenceRequest) -> list[Sequence]:
        seqs = [Sequence(r, len(self.scheduler.live) + r.id, self.now) for r in requests]
        for seq in seqs:
            self.scheduler.add(seq)
        return seqs

    def plan(self) -> list[tuple[int, int, int]]:
        """Run one step. What it computed: (id, first position, number of tokens), in the order of the batch."""
        plan = self.scheduler.schedule(self.now)
        self.update(plan)
        return [(item.seq.id, item.start, item.num_tokens) for item in plan.sequences]

    def update(self, plan: StepPlan) -> list[SequenceOutput]:
        outputs = self.scheduler.update(plan, [[Row()] * item.num_logits for item in plan.sequences], self.now)
        check_integrity(self.scheduler)
        return outputs


class Run:
    """An engine on the oracle executor, with a clock that stands still unless told."""

    def __init__(self, engine_config: EngineConfig) -> None:
        self.now = 50.0
        self.executor = OracleExecutor(engine_config.num_blocks, engine_config.block_size)
        self.engine = Engine(self.executor, engine_config, lambda: self.now)
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float | None]] = {}
        self.finishes: dict[int, FinishOutput] = {}

    def step(self, count: int = 1) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        for _ in range(count):
            outputs = self.engine.step()
            self.engine.check_integrity()
            for output in outputs:
                assert output.id not in self.finishes, "output after the end"
                self.tokens.setdefault(output.id, []).extend(token.token_id for token in output.tokens)
                self.logprobs.setdefault(output.id, []).extend(token.logprob for token in output.tokens)
                if output.finish is not None:
                    self.finishes[output.id] = output.finish
        return outputs

    def finish(self) -> None:
        for _ in range(1000):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")


@contextmanager
def running(engine_config: EngineConfig) -> Iterator[Run]:
    """A Run that ends with every block free."""
    run = Run(engine_config)
    yield run
    stats = run.engine.stats()
    run.engine.check_integrity()
    assert (stats.num_running, stats.num_waiting, stats.num_parked) == (0, 0, 0), "sequences are left"
    assert stats.num_free_blocks == stats.num_total_blocks, "blocks are left"
