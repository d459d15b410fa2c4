"""Preempted sequences whose KV waits in host memory: what is copied where, and when it is computed again instead.

The state machine (machine.py) has swapping among everything else; here is what can be calculated by hand.
"""

from __future__ import annotations

import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.engine.errors import ConfigError
from headrace.engine.integrity import check_integrity
from headrace.engine.swap import Swap
from headrace.kernels.batch import RowResult, StepBatch

from tests.engine.oracle import OracleExecutor, solo_tokens
from tests.engine.support import Run, Steps, config, request
from tests.engine.test_pipeline import QueueingOracle


def tight(**changes: int | bool) -> EngineConfig:
    """6 usable blocks of 4 tokens: two sequences of 8 + 12 tokens get into each other's way."""
    return config(**{"num_blocks": 7, "max_model_len": 24, "num_host_blocks": 6, **changes})


def run_two(engine_config: EngineConfig, executor: OracleExecutor | None = None) -> Run:
    """Both to their end, every step checked; the tokens are those of solo runs."""
    run = Run(engine_config)
    run.executor = executor or OracleExecutor(engine_config.num_blocks, 4, engine_config.num_host_blocks)
    run.engine = Engine(run.executor, engine_config, lambda: run.now)
    requests = [request(number, 8, max_tokens=12) for number in (1, 2)]
    for each in requests:
        run.engine.add(each)
    run.finish()
    for each in requests:
        assert run.tokens[each.id] == solo_tokens(each.prompt, each.id, 12)
    stats = run.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_host_blocks == stats.num_host_blocks == engine_config.num_host_blocks
    return run


def num_computed(run: Run) -> int:
    return sum(run.executor.batches)


def test_no_token_is_computed_twice_where_host_memory_is_enough() -> None:
    """Prefix hits are off, so that host memory alone can be the reason."""
    swapped = run_two(tight(enable_prefix_cache=False))
    assert swapped.engine.stats().num_swapped_out == swapped.engine.stats().num_preemptions
    assert num_computed(swapped) == 2 * (8 + 12 - 1)
    recomputed = run_two(tight(enable_prefix_cache=False, num_host_blocks=0))
    assert recomputed.engine.stats().num_swapped_out == 0
    assert num_computed(recomputed) > num_computed(swapped)


def test_with_one_step_in_flight_the_copies_come_after_it() -> None:
    engine_config = tight(enable_prefix_cache=False)
    run = run_two(engine_config, QueueingOracle(7, 4, 6))
    assert run.engine.stats().num_swapped_out > 0
    assert run.executor.num_swapped > 0


@pytest.mark.parametrize(("changes", "why"), [({"num_host_blocks": 1}, "no room"), ({"min_swap_tokens": 99}, "short")])
def test_what_cannot_be_kept_is_computed_again(changes: dict[str, int], why: str) -> None:
    run = run_two(tight(**changes))
    assert (run.engine.stats().num_swapped_out, run.executor.num_swapped) == (0, 0), why


def preempted(engine_config: EngineConfig) -> Steps:
    """Sequence 2 has computed 10 tokens when sequence 1 needs its blocks."""
    steps = Steps(engine_config)
    steps.add(request(1, 8, max_tokens=16), request(2, 8, max_tokens=8))
    swaps: list[Swap] = []
    while not swaps:
        plan = steps.scheduler.schedule(0.0)
        swaps += plan.swaps
        steps.update(plan)
    assert [swap.is_in for swap in swaps] == [False]
    assert len(swaps[0].blocks) == len(swaps[0].host_blocks) == 3
    return steps


def test_blocks_that_are_still_cached_are_not_copied_back() -> None:
    """Full blocks of the prompt stay in the prefix cache until somebody needs them; what comes back is the rest."""
    steps = preempted(tight())
    seq = steps.scheduler.live[2]
    assert (seq.num_swapped, len(seq.host_table), seq.block_table) == (10, 3, [])
    steps.scheduler.finish(steps.scheduler.live[1], "cancelled", 0.0)
    plan = steps.scheduler.schedule(0.0)
    (swap,) = plan.swaps
    assert swap.is_in
    kept = len(seq.block_table) - len(swap.blocks)
    assert swap.blocks == tuple(seq.block_table[kept:3])
    assert 0 < kept < 3
    assert [(item.start, item.num_tokens) for item in plan.sequences] == [(10, 1)]
    steps.update(plan)


def test_cancelled_while_swapped_out_it_leaves_nothing() -> None:
    steps = preempted(tight())
    assert len(steps.scheduler.host.free) == 3
    steps.scheduler.finish(steps.scheduler.live[2], "cancelled", 0.0)
    check_integrity(steps.scheduler)
    assert len(steps.scheduler.host.free) == 6


def test_a_parked_sequence_keeps_its_host_blocks() -> None:
    steps = preempted(tight())
    seq = steps.scheduler.live[2]
    steps.scheduler.park(seq)
    check_integrity(steps.scheduler)
    steps.scheduler.finish(steps.scheduler.live[1], "cancelled", 0.0)
    steps.scheduler.unpark(seq)
    plan = steps.scheduler.schedule(0.0)
    assert [item.start for item in plan.sequences] == [10]
    steps.update(plan)


class PlainExecutor:
    """Cannot swap, as the native executor."""

    name = "plain"

    def execute(self, batch: StepBatch) -> list[RowResult]:
        raise NotImplementedError


def test_host_blocks_for_an_executor_that_cannot_swap_are_refused() -> None:
    with pytest.raises(ConfigError, match="plain cannot swap"):
        Engine(PlainExecutor(), tight())
    Engine(PlainExecutor(), tight(num_host_blocks=0))
