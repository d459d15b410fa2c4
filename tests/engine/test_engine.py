"""What a user of the engine relies on: every accepted sequence is answered, once, with what it would get alone."""

from __future__ import annotations

import msgspec
import pytest
from headrace.engine.errors import InvalidSequenceError, QueueFullError

from tests.engine.oracle import score, solo_tokens
from tests.engine.support import Run, config, request, running


def test_tokens_are_those_of_a_solo_run_across_chunks_hits_and_preemption() -> None:
    shared = [3, 1, 4, 1, 5, 9, 2, 6]
    with running(config(num_blocks=13, max_num_batched_tokens=6)) as run:
        requests = [request(i, [*shared, *range(i)], max_tokens=12) for i in range(1, 7)]
        for item in requests:
            run.engine.add(item)
        run.finish()
        for item in requests:
            assert run.tokens[item.id] == solo_tokens(item.prompt, item.id, 12)
        stats = run.engine.stats()
        assert stats.num_preemptions > 0
        assert stats.num_prefix_hits > 0


def test_a_stop_token_ends_and_counts() -> None:
    expected = solo_tokens([1, 2], 1, 8)
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], stop_token_ids=(expected[3],)))
        run.finish()
    count = expected.index(expected[3]) + 1
    assert run.tokens[1] == expected[:count]
    assert (run.finishes[1].reason, run.finishes[1].stop_token_id) == ("stop", expected[3])
    assert run.finishes[1].num_output_tokens == count


def test_the_first_token_may_stop() -> None:
    first = solo_tokens([1, 2], 1, 1)[0]
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], stop_token_ids=(first,)))
        run.finish()
    assert (run.tokens[1], run.finishes[1].reason) == ([first], "stop")


def test_min_tokens_holds_stop_tokens_off() -> None:
    first = solo_tokens([1, 2], 1, 1)[0]
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], max_tokens=6, stop_token_ids=(first,), min_tokens=6))
        run.finish()
    assert first not in run.tokens[1]
    assert run.finishes[1].reason == "length"


def test_max_tokens_ends_with_length() -> None:
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], max_tokens=3))
        run.finish()
    assert (run.finishes[1].reason, run.finishes[1].num_output_tokens) == ("length", 3)
    assert run.finishes[1].stop_token_id is None


def test_a_sequence_may_fill_the_whole_pool() -> None:
    with running(config(num_blocks=5)) as run:
        run.engine.add(request(1, 10, max_tokens=6))
        run.finish()
    assert len(run.tokens[1]) == 6


def test_log_probabilities_come_where_asked_for() -> None:
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], max_tokens=2, num_logprobs=0))
        run.engine.add(request(2, [1, 3], max_tokens=2))
        run.finish()
    first, second = run.tokens[1]
    assert run.logprobs[1] == [score([1, 2], first), score([1, 2, first], second)]
    assert run.logprobs[2] == [None, None]


def test_scoring_answers_every_token_from_the_second_on() -> None:
    prompt = [7, 3, 9, 9, 1, 0, 4, 4, 2, 8]
    with running(config()) as run:
        run.engine.add(request(1, prompt, score=True))
        run.engine.add(request(2, prompt, score=True))  # computes all again: no prefix hit may hide a position
        run.finish()
    for number in (1, 2):
        assert run.tokens[number] == prompt[1:]
        assert run.logprobs[number] == [score(prompt[: i + 1], prompt[i + 1]) for i in range(9)]
        finish = run.finishes[number]
        assert (finish.reason, finish.num_output_tokens, finish.num_cached_tokens) == ("length", 0, 0)


def test_scoring_goes_on_where_it_was_preempted() -> None:
    prompt = list(range(14))
    with running(config(num_blocks=5)) as run:
        run.engine.add(request(1, prompt, score=True))
        run.step()
        assert len(run.tokens[1]) == 4
        run.engine.park(1)
        run.engine.add(request(2, [1] * 8, max_tokens=1))
        run.step()
        assert run.engine.stats().num_preemptions == 1
        run.engine.unpark(1)
        run.finish()
    assert run.tokens[1] == prompt[1:]


def test_cancel_frees_at_once_and_answers_once() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 9))
        run.engine.add(request(2, 2))
        run.step()
        run.engine.cancel(1)
        assert run.engine.stats().num_free_blocks == 16
        run.engine.cancel(1)
        run.engine.cancel(12)
        outputs = run.step()
        assert [output.id for output in outputs if output.finish] == [1]
        assert run.finishes[1].reason == "cancelled"
        run.engine.cancel(1)
        run.finish()
    assert run.finishes[2].reason == "length"


def test_the_answer_to_a_cancelled_sequence_is_work() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 2))
        run.engine.cancel(1)
        assert run.engine.has_work()
        run.finish()
        assert run.executor.batches == []
    assert run.finishes[1].reason == "cancelled"


def test_an_expired_sequence_is_not_computed() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 2, deadline=50.0))
        run.engine.add(request(2, 2, deadline=51.0))
        assert run.engine.next_deadline() == 50.0
        run.step()
        assert (run.finishes[1].reason, run.executor.batches) == ("expired", [2])
        run.now = 51.0
        run.step()
        assert (run.finishes[2].reason, run.executor.batches) == ("expired", [2])
        assert run.engine.next_deadline() is None


def test_a_parked_sequence_expires_too() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 2, deadline=60.0))
        run.step()
        run.engine.park(1)
        assert not run.engine.has_work()
        assert run.engine.next_deadline() == 60.0
        run.now = 60.0
        run.step()
    assert run.finishes[1].reason == "expired"


def test_a_parked_sequence_stops_alone_and_goes_on_where_it_was() -> None:
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], max_tokens=6))
        run.engine.add(request(2, [3, 4], max_tokens=6))
        run.step(2)
        run.engine.park(1)
        run.engine.park(1)
        run.engine.park(99)
        run.step(2)
        assert (len(run.tokens[1]), len(run.tokens[2])) == (2, 4)
        run.engine.unpark(1)
        run.engine.unpark(1)
        run.finish()
    assert run.tokens[1] == solo_tokens([1, 2], 1, 6)
    assert run.tokens[2] == solo_tokens([3, 4], 2, 6)


def test_max_tokens_can_change_in_flight() -> None:
    with running(config()) as run:
        for number in (1, 2, 3):
            run.engine.add(request(number, 2, max_tokens=10))
        run.step(3)
        run.engine.set_max_tokens(1, 3)
        run.engine.set_max_tokens(2, 5)
        run.engine.set_max_tokens(3, 20)
        run.engine.set_max_tokens(4, 1)
        run.step()
        assert (run.finishes[1].reason, run.finishes[1].num_output_tokens) == ("length", 3)
        run.finish()
    assert (run.finishes[2].num_output_tokens, run.finishes[3].num_output_tokens) == (5, 20)


def test_max_tokens_cannot_change_to_what_does_not_fit() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 4, max_tokens=2))
        for max_tokens in (0, 61):
            with pytest.raises(InvalidSequenceError) as caught:
                run.engine.set_max_tokens(1, max_tokens)
            assert caught.value.field == "max_tokens"
        run.finish()
    assert run.finishes[1].num_output_tokens == 2


def test_queue_is_bounded_in_sequences() -> None:
    with running(config(max_waiting_seqs=2)) as run:
        run.engine.add(request(1, 2))
        run.engine.add(request(2, 2))
        with pytest.raises(QueueFullError) as caught:
            run.engine.add(request(3, 2))
        assert caught.value.limit == "sequences"
        run.step()  # both run now
        run.engine.add(request(3, 2))
        run.finish()
    assert set(run.finishes) == {1, 2, 3}


def test_queue_is_bounded_in_tokens() -> None:
    with running(config(max_waiting_tokens=70)) as run:
        run.engine.add(request(1, 40))
        with pytest.raises(QueueFullError) as caught:
            run.engine.add(request(2, 31))
        assert caught.value.limit == "tokens"
        run.engine.add(request(2, 30))
        run.finish()


def test_parked_sequences_count_as_waiting() -> None:
    with running(config(max_waiting_seqs=2)) as run:
        for number in (1, 2):
            run.engine.add(request(number, 2))
        run.step()
        for number in (1, 2):
            run.engine.park(number)
        with pytest.raises(QueueFullError):
            run.engine.add(request(3, 2))
        for number in (1, 2):
            run.engine.cancel(number)
        run.finish()


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (request(1, []), "prompt"),
        (request(1, [5], score=True), "prompt"),
        (request(1, 64), "prompt"),
        (request(1, 65, score=True), "prompt"),
        (request(1, 2, max_tokens=0), "max_tokens"),
        (request(1, 2, max_tokens=63), "max_tokens"),
        (request(1, [1, -1]), "prompt"),
        (request(1, [1, 60]), "prompt"),
        (request(1, 2, stop_token_ids=(60,)), "stop_token_ids"),
        (request(1, 2, logit_bias={60: 1.0}), "logit_bias"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_never_run_is_refused(bad: object, field: str) -> None:
    with running(config(vocab_size=60)) as run:
        with pytest.raises(InvalidSequenceError) as caught:
            run.engine.add(bad)  # type: ignore[arg-type]
        assert caught.value.field == field
        assert not run.engine.has_work()


def test_what_just_fits_is_accepted() -> None:
    with running(config(vocab_size=60)) as run:
        run.engine.add(request(1, 63, max_tokens=1))
        run.engine.add(request(2, 64, max_tokens=0, score=True))
        run.finish()
    assert len(run.tokens[2]) == 63


def test_token_ids_fit_int32_even_without_a_vocabulary() -> None:
    with running(config()) as run, pytest.raises(InvalidSequenceError):
        run.engine.add(request(1, [2**31]))


def test_ids_in_use_are_refused_and_free_again_after_the_end() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 2, max_tokens=1))
        with pytest.raises(InvalidSequenceError) as caught:
            run.engine.add(request(1, 2))
        assert caught.value.field == "id"
        run.finish()
        run.finishes.clear()
        run.engine.add(request(1, 2, max_tokens=1))
        run.finish()


def test_timing_adds_up() -> None:
    with running(config(max_num_seqs=1, max_logit_rows=1)) as run:
        run.executor.fail = lambda batch: setattr(run, "now", run.now + 1.0)  # a step takes a second
        run.engine.add(request(1, 12, max_tokens=3, arrival=49.0))
        run.engine.add(request(2, 2, max_tokens=1))
        run.finish()
    first, second = run.finishes[1], run.finishes[2]
    assert (first.queue_seconds, first.prefill_seconds, first.decode_seconds) == (1.0, 2.0, 2.0)
    assert (second.queue_seconds, second.prefill_seconds, second.decode_seconds) == (4.0, 1.0, 0.0)


def test_a_sequence_that_never_ran_spent_all_its_time_in_the_queue() -> None:
    with running(config()) as run:
        run.engine.add(request(1, 2, deadline=53.0))
        run.now = 53.5
        run.finish()
    finish = run.finishes[1]
    assert (finish.queue_seconds, finish.prefill_seconds, finish.decode_seconds) == (3.5, 0.0, 0.0)


def test_usage_counts_cached_tokens() -> None:
    with running(config(max_num_batched_tokens=24)) as run:
        for number in (1, 2):
            run.engine.add(request(number, list(range(10)), max_tokens=2))
            run.finish()
    assert [run.finishes[n].num_cached_tokens for n in (1, 2)] == [0, 8]
    assert [run.finishes[n].num_prompt_tokens for n in (1, 2)] == [10, 10]


def test_stats_are_a_snapshot() -> None:
    run = Run(config(max_num_seqs=2, max_logit_rows=2))
    for number in (1, 2, 3):
        run.engine.add(request(number, 3))
    run.step()
    run.engine.park(2)
    stats = run.engine.stats()
    assert (stats.num_steps, stats.num_running, stats.num_waiting, stats.num_parked) == (1, 1, 1, 1)
    assert (stats.num_free_blocks, stats.num_total_blocks) == (14, 16)
    run.engine.step()
    assert run.engine.stats().num_steps == 2
    assert stats.num_steps == 1


def test_integrity_check_finds_a_lost_block() -> None:
    run = Run(config())
    run.engine.add(request(1, 9))
    run.step()
    run.engine._scheduler.blocks.free.pop()
    with pytest.raises(AssertionError, match="lost"):
        run.engine.check_integrity()


def test_tokens_held_are_gone_on_from_as_if_generated_here() -> None:
    with running(config(enable_prefix_cache=False)) as run:
        run.engine.add(request(1, 5, 12, min_tokens=7, stop_token_ids=tuple(range(25))))
        run.finish()
        whole, reason = run.tokens[1], run.finishes[1].reason
        assert len(whole) >= 8
    for count in range(1, 8):
        with running(config()) as run:
            again = request(1, 5, 12, min_tokens=7, stop_token_ids=tuple(range(25)))
            run.engine.add(msgspec.structs.replace(again, held=whole[:count]))
            run.finish()
            assert run.tokens[1] == whole[count:]
            finish = run.finishes[1]
            assert (finish.reason, finish.num_prompt_tokens, finish.num_output_tokens) == (reason, 5, len(whole))
            assert finish.num_cached_tokens <= 5


@pytest.mark.parametrize("held", [[1] * 8, [1] * 9, [-1]])
def test_tokens_held_leave_something_to_generate(held: list[int]) -> None:
    with running(config()) as run, pytest.raises(InvalidSequenceError, match="held"):
        run.engine.add(msgspec.structs.replace(request(1, 5, 8), held=held))
