"""What goes wrong inside a step is charged to the sequence that caused it, and to nobody else."""

from __future__ import annotations

import logging

import pytest
from headrace.kernels.batch import RowResult, StepBatch

from tests.engine.oracle import choose, solo_tokens
from tests.engine.support import config, request, running


def test_numeric_failure_ends_one_sequence_and_is_not_shared() -> None:
    prompt = list(range(9))
    with running(config(max_num_batched_tokens=24)) as run:
        run.executor.has_nan = lambda sampling: sampling.seed == 1
        run.engine.add(request(1, prompt))
        run.engine.add(request(2, [5, 6], max_tokens=3))
        run.step()
        assert (run.finishes[1].reason, run.finishes[1].error) == ("error", "NUMERIC")
        run.engine.add(request(3, prompt, max_tokens=3))
        run.finish()
    assert run.tokens[1] == []
    assert run.tokens[2] == solo_tokens([5, 6], 2, 3)
    assert run.tokens[3] == solo_tokens(prompt, 3, 3)
    assert run.finishes[3].num_cached_tokens == 0


def test_a_late_numeric_failure_takes_back_what_was_shared_before() -> None:
    with running(config(max_num_batched_tokens=24)) as run:
        run.engine.add(request(1, list(range(9))))
        run.step()
        run.executor.has_nan = lambda sampling: True
        run.step()
        run.executor.has_nan = lambda sampling: False
        run.engine.add(request(2, list(range(9)), max_tokens=1))
        run.finish()
    assert run.finishes[2].num_cached_tokens == 0


def raise_for(tokens: set[int]) -> object:
    def fail(batch: StepBatch) -> None:
        if tokens & set(batch.token_ids.tolist()):
            raise ValueError("planted")

    return fail


def test_a_failing_step_is_charged_to_the_guilty_alone(caplog: pytest.LogCaptureFixture) -> None:
    with running(config(max_num_batched_tokens=24)) as run:
        run.executor.fail = raise_for({49})  # type: ignore[assignment]
        for number, prompt in enumerate([[1, 2], [3, 49, 4, 5, 6], [7], [8, 9, 10]]):
            run.engine.add(request(number, prompt, max_tokens=1))
        with caplog.at_level(logging.CRITICAL, "headrace.engine.engine"):
            run.step()
        assert run.executor.batches == [11, 7, 2, 5, 4]  # all; the first half; each of it; the second half
    assert (run.finishes[1].reason, run.finishes[1].error) == ("error", "STEP_FAILED")
    for number, prompt in ((0, [1, 2]), (2, [7]), (3, [8, 9, 10])):
        assert run.finishes[number].reason == "length"
        assert run.tokens[number] == solo_tokens(prompt, number, 1)


def test_a_failed_step_leaves_nothing_in_the_prefix_cache() -> None:
    prompt = [3, 49, 4, 5, 6]
    with running(config()) as run:
        run.executor.fail = raise_for({49})  # type: ignore[assignment]
        run.engine.add(request(1, prompt, max_tokens=1))
        run.step()
        run.executor.fail = lambda batch: None
        run.engine.add(request(2, prompt, max_tokens=1))
        run.finish()
    assert run.finishes[1].error == "STEP_FAILED"
    assert run.finishes[2].num_cached_tokens == 0
    assert run.tokens[2] == [choose(prompt, 2)]


def test_a_failure_is_logged_without_tokens(caplog: pytest.LogCaptureFixture) -> None:
    with running(config()) as run:
        run.executor.fail = raise_for({49})  # type: ignore[assignment]
        run.engine.add(request(1, [49, 48], max_tokens=1))
        run.step()
        assert run.engine.stats().num_step_failures == 1
    (record,) = caplog.records
    assert record.getMessage() == "a step of 1 sequences failed"
    assert record.exc_info is not None


def test_an_executor_that_gives_too_few_results_is_a_failed_step(caplog: pytest.LogCaptureFixture) -> None:
    with running(config()) as run:
        execute = run.executor.execute

        def lossy(batch: StepBatch) -> list[RowResult]:
            return execute(batch)[1:]

        run.executor.execute = lossy  # type: ignore[method-assign]
        run.engine.add(request(1, 2))
        run.step()
    assert run.finishes[1].error == "STEP_FAILED"
