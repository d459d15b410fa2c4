"""The arithmetic of the benches, by hand: what is drawn, when it is due, what the numbers mean."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from headrace.server.cli.load import Lengths, Percentiles, Record, Slo, Workload, summarise


@pytest.mark.parametrize(
    "text",
    ["", "0", "-3", "x", "nan", "inf", "fixed:", "uniform:5", "uniform:9,5", "uniform:0,5", "lognormal:5", "gauss:1,2"],
)
def test_nonsense_is_no_distribution(text: str) -> None:
    with pytest.raises(ValueError, match="is no distribution"):
        Lengths.parse(text)


def test_lengths_are_drawn_as_they_are_named() -> None:
    rng = random.Random(0)
    assert {Lengths.parse(text).draw(rng) for text in ("7", "fixed:7", "uniform:7,7", "lognormal:7,0")} == {7}
    uniform = [Lengths.parse("uniform:3,6").draw(rng) for _ in range(400)]
    assert set(uniform) == {3, 4, 5, 6}
    lognormal = [Lengths.parse("lognormal:100,0.5,150").draw(rng) for _ in range(2000)]
    assert max(lognormal) == 150
    assert 90 < statistics.median(lognormal) < 110
    assert min(Lengths.parse("lognormal:1,3").draw(rng) for _ in range(200)) == 1


def workload(**changes: object) -> Workload:
    settings: dict[str, object] = {
        "num_requests": 500,
        "concurrency": 4,
        "rate": None,
        "arrival": "poisson",
        "prompt": Lengths.parse("8"),
        "output": Lengths.parse("4"),
        "seed": 1,
    }
    return Workload(**{**settings, **changes})  # type: ignore[arg-type]


def test_a_closed_loop_has_no_times_and_an_open_one_has() -> None:
    assert {request.due for request in workload().plan(1000)} == {None}
    constant = [request.due for request in workload(rate=10, arrival="constant").plan(1000)]
    assert constant[:3] == pytest.approx([0, 0.1, 0.2])
    poisson = [request.due or 0.0 for request in workload(rate=10).plan(1000)]
    gaps = [b - a for a, b in itertools.pairwise(poisson)]
    assert 0.09 < statistics.mean(gaps) < 0.11
    assert 0.08 < statistics.stdev(gaps) < 0.12  # of an exponential, as large as the mean


def test_prompts_are_fresh_valid_and_repeatable() -> None:
    plan = workload().plan(1000)
    prompts = [request.prompt for request in plan]
    assert len(set(prompts)) == len(prompts)
    assert all(300 <= token < 1000 for prompt in prompts for token in prompt)
    assert workload().plan(1000) == plan
    assert workload(seed=2).plan(1000) != plan
    assert all(0 <= token < 40 for request in workload().plan(40) for token in request.prompt)


def test_the_numbers_of_a_run() -> None:
    quick, slow, failed = Record(10.0, 5), Record(10.0, 5), Record(10.0, 5, error="OVERLOADED")
    for record, times in ((quick, (10.5, 11.0, 11.5)), (slow, (12.0, 14.0))):
        for time in times:
            record.add(time, 1)
    slow.add(14.5, 0)  # a flush of text is no token
    summary = summarise([quick, slow, failed], Slo(ttft_ms=1000, tpot_ms=1000))
    assert (summary.num_requests, summary.num_failed, summary.failures) == (3, 1, {"OVERLOADED": 1})
    assert summary.seconds == 4.0
    assert (summary.prompt_tokens, summary.output_tokens) == (10, 5)
    assert (summary.output_tokens_per_second, summary.total_tokens_per_second) == (1.25, 3.75)
    assert summary.ttft_ms == Percentiles(1250, 500, 2000, 2000, 2000)
    assert summary.itl_ms == Percentiles(1000, 500, 2000, 2000, 2000)
    assert summary.tpot_ms == Percentiles(1250, 500, 2000, 2000, 2000)
    assert summary.e2e_ms == Percentiles(2750, 1500, 4000, 4000, 4000)
    assert summary.goodput_per_second == 0.25


def test_several_tokens_in_a_message_share_its_time() -> None:
    record = Record(0.0, 1)
    record.add(1.0, 2)
    record.add(2.0, 4)
    assert record.num_tokens == 6
    assert record.tpot == 0.25
    single = Record(0.0, 1)
    single.add(1.0, 1)
    assert single.tpot is None


def test_each_part_of_the_objective_counts() -> None:
    record = Record(0.0, 1)
    record.add(1.0, 1)
    record.add(3.0, 1)
    assert Slo().is_kept(record)
    assert Slo(ttft_ms=1000, tpot_ms=2000).is_kept(record)
    assert not Slo(ttft_ms=999).is_kept(record)
    assert not Slo(tpot_ms=1999).is_kept(record)
    assert not Slo().is_kept(Record(0.0, 1))


def test_a_run_without_answers_has_no_numbers() -> None:
    summary = summarise([Record(0.0, 1)], Slo())
    assert summary.failures == {"no token": 1}
    assert (summary.ttft_ms, summary.output_tokens_per_second, summary.goodput_per_second) == (None, 0, None)
