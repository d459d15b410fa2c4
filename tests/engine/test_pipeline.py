"""One step in flight: whatever happens meanwhile, every sequence gets the tokens of a solo run, and no block is lost.

The executor is the oracle of oracle.py with a queue: a step's results are there only once they are collected, and a
token that is not known yet is named by its row.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from dataclasses import replace

import msgspec
import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.integrity import check_integrity
from headrace.engine.types import FinishOutput, SequenceOutput
from headrace.kernels.batch import ExecutorLostError, PipelinedExecutor, RowResult, StepBatch

from tests.engine.oracle import VOCAB, OracleExecutor, choose, score, solo_tokens
from tests.engine.support import config, request


class QueueingOracle(OracleExecutor):
    """Implements PipelinedExecutor. max_in_flight: the most steps that were ever queued at once."""

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks)
        self.queue: deque[list[RowResult]] = deque()
        self.last: list[int] = []
        self.max_in_flight = 0
        self.num_pending = 0

    def submit(self, batch: StepBatch) -> None:
        tokens = batch.token_ids.copy()
        for row in (tokens < 0).nonzero()[0].tolist():
            tokens[row] = self.last[-1 - tokens[row]]
            self.num_pending += 1
        results = super().execute(replace(batch, token_ids=tokens))
        self.last = [result.token_id for result in results]
        self.queue.append(results)
        self.max_in_flight = max(self.max_in_flight, len(self.queue))

    def collect(self) -> list[RowResult]:
        return self.queue.popleft()

    def execute(self, batch: StepBatch) -> list[RowResult]:
        assert not self.queue, "a step is run at once while another is in flight"
        self.submit(batch)
        return self.collect()


class Run:
    """A pipelined engine; after every step its books are checked."""

    def __init__(self, engine_config: EngineConfig) -> None:
        self.now = 50.0
        self.executor = QueueingOracle(engine_config.num_blocks, engine_config.block_size)
        self.engine = Engine(self.executor, engine_config, lambda: self.now)
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float | None]] = {}
        self.finishes: dict[int, FinishOutput] = {}

    def step(self) -> list[SequenceOutput]:
        outputs = self.engine.step()
        check_integrity(self.engine._scheduler)
        assert len({output.id for output in outputs}) == len(outputs), "two outputs for one sequence"
        for output in outputs:
            assert output.id not in self.finishes, "output after the end"
            self.tokens.setdefault(output.id, []).extend(token.token_id for token in output.tokens)
            self.logprobs.setdefault(output.id, []).extend(token.logprob for token in output.tokens)
            if output.finish is not None:
                self.finishes[output.id] = output.finish
        return outputs

    def finish(self) -> None:
        for _ in range(2000):
            if not self.engine.has_work():
                break
            self.step()
        else:
            raise AssertionError("the engine does not come to an end")
        stats = self.engine.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0)
        assert not self.executor.queue, "a step was never collected"
        if not stats.num_parked:
            assert stats.num_free_blocks == stats.num_total_blocks, "blocks are left"


def test_the_oracle_is_a_pipelined_executor() -> None:
    assert isinstance(QueueingOracle(4, 4), PipelinedExecutor)
    assert not isinstance(OracleExecutor(4, 4), PipelinedExecutor)


def test_the_next_step_is_queued_before_the_last_is_known() -> None:
    run = Run(config())
    run.engine.add(request(1, [1, 2, 3], max_tokens=5))
    assert run.step() == []  # the prompt is in flight
    assert [len(output.tokens) for output in run.step()] == [1]  # and the second token is
    assert run.executor.max_in_flight == 2
    run.finish()
    assert run.tokens[1] == solo_tokens([1, 2, 3], 1, 5)
    assert run.finishes[1].reason == "length"
    assert run.executor.num_pending == 4
    assert len(run.executor.batches) == 5  # the last token was known to be the last: nothing was computed in vain


def test_a_stop_token_leaves_one_row_too_many_and_no_token() -> None:
    tokens = solo_tokens([1, 2, 3], 1, 8)
    stop = next(token for index, token in enumerate(tokens) if index > 1 and token not in tokens[:index])
    run = Run(config())
    run.engine.add(request(1, [1, 2, 3], max_tokens=30, stop_token_ids=(stop,)))
    run.engine.add(request(2, [7, 8], max_tokens=12))
    run.finish()
    assert run.tokens[1] == tokens[: tokens.index(stop) + 1]
    assert (run.finishes[1].reason, run.finishes[1].stop_token_id) == ("stop", stop)
    assert run.tokens[2] == solo_tokens([7, 8], 2, 12)


def test_min_tokens_counts_the_token_in_flight() -> None:
    banned = tuple(range(0, VOCAB, 2))
    run = Run(config())
    run.engine.add(request(1, [1, 2, 3], max_tokens=20, stop_token_ids=banned, min_tokens=4))
    run.finish()
    want = [1, 2, 3]
    while len(want) < 3 + 20 and (len(want) <= 3 + 4 or want[-1] not in banned):
        want.append(choose(want, 1, banned if len(want) < 3 + 4 else ()))
    assert run.tokens[1] == want[3:]


def test_whoever_is_cancelled_with_a_step_in_flight_gets_nothing_more() -> None:
    run = Run(config())
    run.engine.add(request(1, [1, 2, 3], max_tokens=20))
    run.engine.add(request(2, [4, 5], max_tokens=6))
    for _ in range(3):
        run.step()
    run.engine.cancel(1)
    run.engine.add(request(3, [9] * 7, max_tokens=6))  # takes the blocks over at once
    run.finish()
    assert run.finishes[1].reason == "cancelled"
    assert len(run.tokens[1]) == 2
    assert run.tokens[2] == solo_tokens([4, 5], 2, 6)
    assert run.tokens[3] == solo_tokens([9] * 7, 3, 6)


def test_whoever_comes_back_with_its_last_token_in_flight_computes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(config())
    run.engine.add(request(1, [1, 2, 3], max_tokens=2))
    run.engine.add(request(2, [4, 5], max_tokens=6))
    run.step()
    run.step()
    run.engine.park(1)
    run.engine.unpark(1)
    run.finish()
    assert run.tokens[1] == solo_tokens([1, 2, 3], 1, 2)
    assert run.tokens[2] == solo_tokens([4, 5], 2, 6)
    assert not caplog.records, "a step could not be queued"


def test_a_numeric_failure_ends_one_sequence_and_what_it_had_in_flight() -> None:
    run = Run(config())
    run.executor.has_nan = lambda sampling: sampling.seed == 1 and sampling.position == 6
    run.engine.add(request(1, [1, 2, 3], max_tokens=20))
    run.engine.add(request(2, [4, 5], max_tokens=9))
    run.finish()
    assert (run.finishes[1].reason, run.finishes[1].error) == ("error", "NUMERIC")
    assert run.tokens[1] == solo_tokens([1, 2, 3], 1, 3)
    assert run.tokens[2] == solo_tokens([4, 5], 2, 9)


def test_a_step_that_cannot_be_queued_is_charged_to_the_guilty_alone(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(config(max_num_batched_tokens=24))
    run.engine.add(request(1, [1, 2], max_tokens=8))
    run.step()
    run.step()

    def fail(batch: StepBatch) -> None:
        if 49 in batch.token_ids.tolist():
            raise ValueError("planted")

    run.executor.fail = fail
    run.engine.add(request(2, [3, 49, 4], max_tokens=4))
    run.engine.add(request(3, [5, 6], max_tokens=4))
    with caplog.at_level(logging.CRITICAL, "headrace.engine"):
        run.finish()
    assert (run.finishes[2].reason, run.finishes[2].error) == ("error", "STEP_FAILED")
    assert run.tokens[1] == solo_tokens([1, 2], 1, 8)
    assert run.tokens[3] == solo_tokens([5, 6], 3, 4)


def test_a_step_that_fails_as_it_runs_ends_its_sequences(caplog: pytest.LogCaptureFixture) -> None:
    run = Run(config())
    run.engine.add(request(1, [1, 2], max_tokens=8))
    run.step()
    run.executor.queue[0] = []  # too few results
    with caplog.at_level(logging.CRITICAL, "headrace.engine"):
        run.finish()
    assert (run.finishes[1].reason, run.finishes[1].error) == ("error", "STEP_FAILED")


def test_a_lost_device_ends_the_engine() -> None:
    run = Run(config())
    run.engine.add(request(1, [1, 2]))

    def lose(batch: StepBatch) -> None:
        raise ExecutorLostError("the device is gone")

    run.executor.fail = lose
    with pytest.raises(ExecutorLostError):
        run.engine.step()


@pytest.mark.parametrize("seed", range(40))
def test_whatever_happens_the_tokens_are_those_of_a_solo_run(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 2, 4])
    run = Run(
        config(
            num_blocks=rng.choice([24, 32, 60]) // block_size + 1,
            block_size=block_size,
            max_num_batched_tokens=rng.choice([4, 6, 12]),
            enable_prefix_cache=rng.random() < 0.8,
            max_waiting_seqs=50,
            max_waiting_tokens=2000,
        )
    )
    wanted, scored, parked = {}, {}, set()
    bases = [[(base * 17 + i * 3) % VOCAB for i in range(9)] for base in range(2)]
    for number in range(12):
        prompt = [*rng.choice(bases)[: rng.randint(2, 9)], rng.randrange(3)]
        is_score = rng.random() < 0.15
        count = rng.randint(1, 12)
        stop = tuple(range(0, VOCAB, 7)) if rng.random() < 0.4 else ()
        run.engine.add(request(number, prompt, max_tokens=count, score=is_score, stop_token_ids=stop, num_logprobs=0))
        if is_score:
            scored[number] = [score(prompt[: i + 1], prompt[i + 1]) for i in range(len(prompt) - 1)]
        else:
            tokens = solo_tokens(prompt, number, count)
            end = next((i + 1 for i, token in enumerate(tokens) if token in stop), count)
            wanted[number] = tokens[:end]
        for _ in range(rng.randint(0, 4)):
            run.step()
            live = [n for n in wanted if n not in run.finishes]
            pick, what = (rng.choice(live) if live else None), rng.random()
            if pick is not None and what < 0.1:
                run.engine.cancel(pick)
                wanted[pick] = wanted[pick][: len(run.tokens.get(pick, []))]
            elif pick is not None and what < 0.3:
                run.engine.park(pick)
                parked.add(pick)
            elif what < 0.5 and parked:
                run.engine.unpark(parked.pop())
    for number in parked:
        run.engine.unpark(number)
    run.finish()
    assert run.finishes.keys() == wanted.keys() | scored.keys()
    for number, tokens in wanted.items():
        assert run.tokens.get(number, []) == tokens, f"sequence {number}"
    for number, logprobs in scored.items():
        assert run.logprobs[number] == logprobs
    assert run.executor.max_in_flight == 2


@pytest.mark.parametrize("seed", range(20))
def test_credit_is_exact_with_a_step_in_flight(seed: int) -> None:
    """Grants and pauses come at any time, between a step's being queued and its being known too; conversations are
    pinned when they end, with rows in flight."""
    rng = random.Random(seed)
    run = Run(config(num_blocks=rng.choice([13, 30]), max_waiting_seqs=50, max_waiting_tokens=2000))
    granted = {number: rng.randint(0, 4) for number in range(8)}
    wanted = {}
    for number, credit in granted.items():
        item = request(number, [number % 3 + 1] * rng.randint(1, 9), max_tokens=16)
        wanted[number] = solo_tokens(item.prompt, number, 16)
        run.engine.add(msgspec.structs.replace(item, credit=credit, conversation=number % 3, lease=100.0))
    for _ in range(200):
        run.step()
        assert all(len(run.tokens.get(number, [])) <= credit for number, credit in granted.items())
        pick, what = rng.randrange(8), rng.random()
        if what < 0.2:
            granted[pick] += rng.randint(1, 3)
            run.engine.grant(pick, granted[pick])
        elif what < 0.3:
            (run.engine.park if what < 0.25 else run.engine.unpark)(pick)
    for number in granted:
        run.engine.unpark(number)
    run.finish()
    assert all(len(run.tokens.get(number, [])) == min(credit, 16) for number, credit in granted.items())
    for number in granted:
        run.engine.grant(number, 16)
    run.finish()
    assert run.tokens == wanted
    assert run.executor.max_in_flight == 2
