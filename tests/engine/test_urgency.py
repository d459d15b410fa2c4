"""Who is admitted next: classes, slack, fair shares, and that nobody starves. Small enough to work out by hand."""

from __future__ import annotations

import msgspec
import pytest
from headrace.engine.estimates import Estimates, StepCost
from headrace.engine.sequence import Status
from headrace.engine.types import BATCH, INTERACTIVE, STANDARD, SequenceRequest
from headrace.engine.urgency import FairShares

from tests.engine.support import Steps, config, request


def asks(number: int, prompt: int = 1, max_tokens: int = 1, **changes: object) -> SequenceRequest:
    return msgspec.structs.replace(request(number, prompt, max_tokens), **changes)


def one_at_a_time(**changes: int) -> Steps:
    return Steps(config(max_num_seqs=1, max_logit_rows=1, max_waiting_seqs=99, **changes))


def order_of(steps: Steps) -> list[int]:
    """The ids in the order in which they ran for the first time."""
    seen: dict[int, None] = {}
    while steps.scheduler.live:
        seen.update(dict.fromkeys(number for number, _, _ in steps.plan()))
        steps.now += 1.0
    return list(seen)


def test_classes_go_first_then_arrival() -> None:
    steps = one_at_a_time()
    classes = [BATCH, STANDARD, INTERACTIVE, BATCH, STANDARD, INTERACTIVE]
    steps.add(*(asks(i, priority=priority) for i, priority in enumerate(classes)))
    assert order_of(steps) == [2, 5, 1, 4, 0, 3]


def test_within_a_class_less_slack_goes_first() -> None:
    steps = one_at_a_time()
    steps.add(asks(1), asks(2, deadline=50.0), asks(3, deadline=40.0), asks(4, deadline=30.0, priority=BATCH))
    assert order_of(steps) == [3, 2, 1, 4]


def test_slack_counts_the_work_that_is_left() -> None:
    steps = one_at_a_time()
    for _ in range(100):
        steps.scheduler.estimates.add_step(10, 1, 1.0)  # a token in a second, ten tokens of a prompt likewise
    steps.add(asks(1, max_tokens=2, deadline=40.0), asks(2, max_tokens=20, deadline=45.0))
    assert order_of(steps)[0] == 2


def test_a_distant_deadline_is_no_urgency() -> None:
    """Or a long job would always go before a short one that came first."""
    steps = one_at_a_time()
    steps.add(asks(1, deadline=600.0), asks(2, max_tokens=30, deadline=500.0))
    assert order_of(steps) == [1, 2]


def test_tenants_share_by_tokens_not_by_requests() -> None:
    """One tenant's requests are three times as long: it gets a third as many places."""
    steps = one_at_a_time()
    steps.add(*(asks(i, 4, 4, tenant="long") for i in range(6)), *(asks(i, 4, tenant="short") for i in range(6, 12)))
    order = order_of(steps)
    # 4 + 2 * 4 = 12 a request against 4 + 2 = 6; the first of a pair of equals came first.
    assert ["L" if i < 6 else "s" for i in order[:6]] == ["L", "s", "s", "L", "s", "s"]


def test_a_flood_does_not_hold_up_another_tenant() -> None:
    steps = one_at_a_time()
    steps.add(*(asks(i, tenant="flood") for i in range(20)))
    for _ in range(4):
        steps.plan()
    steps.add(asks(50, tenant="other"))
    assert order_of(steps)[0] == 50


def test_a_tenant_cannot_save_up_for_later() -> None:
    """Away while another was served, it shares from now on instead of being served alone until it has caught up."""
    steps = one_at_a_time()
    steps.add(*(asks(i, tenant="steady") for i in range(40)))
    for _ in range(30):
        steps.plan()
    steps.add(*(asks(i, tenant="late") for i in range(50, 60)))
    order = order_of(steps)[:8]
    assert sum(i >= 50 for i in order) == pytest.approx(4, abs=1)


def test_urgency_is_within_a_tenant_except_that_batch_yields_to_all() -> None:
    """What a caller says of itself must not take anything from others: only modesty counts across tenants."""
    steps = one_at_a_time()
    steps.add(*(asks(i, tenant="a", priority=INTERACTIVE) for i in range(3)), asks(9, tenant="b"))
    steps.add(asks(8, tenant="c", priority=BATCH))
    assert order_of(steps) == [0, 9, 1, 2, 8]


def test_nobody_starves() -> None:
    """A batch request under an endless stream of urgent ones gets the eighth place, or one soon after."""
    steps = one_at_a_time()
    steps.add(asks(1, priority=BATCH))
    for number in range(2, 40):
        steps.add(asks(number, priority=INTERACTIVE, deadline=steps.now + 5))
        if [number for number, _, _ in steps.plan()] == [1]:
            assert number < 12
            return
    raise AssertionError("the batch request was never run")


def test_the_urgent_take_blocks_from_those_of_a_lower_class() -> None:
    steps = Steps(config(num_blocks=9, block_size=1, max_num_batched_tokens=16, enable_prefix_cache=False))
    (modest,) = steps.add(asks(1, 2, 20, priority=BATCH))
    assert steps.plan() == [(1, 0, 2)]
    (urgent,) = steps.add(asks(2, 3, 5, priority=INTERACTIVE))
    assert steps.plan() == [(1, 2, 1), (2, 0, 3)]  # 2 blocks are free
    assert steps.plan() == [(2, 3, 1), (1, 3, 1)]
    assert steps.plan() == [(2, 4, 1)]  # it took those of 1, which has been running for longer
    assert modest.status is Status.WAITING
    assert urgent.status is Status.RUNNING


def test_who_had_waited_longest_is_not_put_back_again() -> None:
    steps = Steps(config(num_blocks=9, block_size=1, max_num_batched_tokens=16, enable_prefix_cache=False))
    steps.scheduler.queue._num_admitted = 7
    (modest,) = steps.add(asks(1, 2, 6, priority=BATCH))
    steps.plan()
    steps.add(asks(2, 3, 5, priority=INTERACTIVE))
    while modest.status is not Status.FINISHED:
        steps.plan()
        assert modest.block_table or modest.status is Status.FINISHED


def test_there_are_few_accounts_and_large_debts_are_remembered() -> None:
    shares = FairShares()
    shares.charge("debtor", 5000)
    for number in range(10_000):
        shares.charge(str(number), 1)
        assert len(shares._accounts) <= 256
    assert shares.served("debtor") == 5000
    assert shares.served("newcomer") == shares.floor <= 100


def test_the_cost_of_a_step_is_a_line() -> None:
    cost = StepCost()
    for i in range(400):
        tokens = 10 + 90 * (i % 2)
        cost.add(tokens, 0.01 + 0.001 * tokens)
    assert (cost.fixed, cost.per_token) == (pytest.approx(0.01, rel=0.01), pytest.approx(0.001, rel=0.01))


def test_steps_that_are_all_alike_cost_by_the_token() -> None:
    cost = StepCost()
    assert (cost.fixed, cost.per_token) == (0.0, 0.0)
    cost.add(20, 0.02)
    cost.add(20, 0.02)
    assert (cost.fixed, cost.per_token) == (0.0, pytest.approx(0.001))


def test_noise_gives_no_negative_cost() -> None:
    cost = StepCost()
    for i in range(100):
        cost.add(10 + i % 2 * 50, 0.05 - i % 2 * 0.03)  # longer steps are quicker: nonsense
    assert cost.per_token == 0.0
    assert cost.fixed > 0.0


def test_estimates_follow_what_happens() -> None:
    estimates = Estimates()
    assert (estimates.token_seconds, estimates.residence_seconds, estimates.output_share) == (0.0, 0.0, 0.0)
    estimates.add_step(8, 0, 9.0)  # a chunk of a prompt: nobody waited for a token
    estimates.add_step(8, 1, 0.5)
    estimates.add_start(10, 5)
    estimates.add_end(3.0, 5, 20)
    assert (estimates.token_seconds, estimates.residence_seconds) == (0.5, 3.0)
    assert (estimates.output_share, estimates.cached_share) == (0.25, 0.5)
