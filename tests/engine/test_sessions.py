"""What sessions ask of the engine: KV pinned between two turns, output by credit, stop tokens changed in flight."""

from __future__ import annotations

import msgspec
import pytest
from headrace.engine.errors import InvalidSequenceError
from headrace.engine.types import SequenceRequest

from tests.engine.oracle import choose, solo_tokens
from tests.engine.support import Run, config, request, running


def turn(number: int, prompt: int | list[int], max_tokens: int, lease: float = 10.0, key: int = 7) -> SequenceRequest:
    """A turn of a conversation."""
    return msgspec.structs.replace(request(number, prompt, max_tokens), conversation=key, lease=lease)


def credited(number: int, prompt: int | list[int], max_tokens: int, credit: int) -> SequenceRequest:
    return msgspec.structs.replace(request(number, prompt, max_tokens), credit=credit)


def ask(run: Run, item: SequenceRequest) -> int:
    """Run a sequence to its end, which must be the right one; how many tokens of its prompt were cached."""
    run.engine.add(item)
    run.finish()
    assert run.tokens[item.id] == solo_tokens(item.prompt, item.id, item.sampling.max_tokens)
    return run.finishes[item.id].num_cached_tokens


def flood(run: Run, first: int, count: int) -> None:
    """Other prompts of 12 tokens, whose 3 full blocks stay cached, one after the other."""
    for number in range(first, first + count):
        ask(run, request(number, [(number * 7 + i * 3) % 50 for i in range(12)], max_tokens=1))


def test_a_pinned_conversation_outlives_what_would_evict_it() -> None:
    """16 blocks of 4: the conversation's 4 and the 21 of 7 other prompts do not fit, and the oldest are the former."""
    for lease, cached in ((10.0, 16), (0.0, 0)):
        with running(config()) as run:
            ask(run, turn(1, 12, 5, lease))
            history = [*request(1, 12).prompt, *run.tokens[1]]
            run.now += 1.0
            flood(run, 20, 7)
            assert run.engine.stats().num_pinned_blocks == (4 if lease else 0)
            assert ask(run, turn(2, [*history, 1, 2], 4, lease)) == cached


def test_pressure_takes_a_pin_and_the_answer_is_the_same() -> None:
    with running(config()) as run:
        ask(run, turn(1, 12, 5))
        history = [*request(1, 12).prompt, *run.tokens[1]]
        ask(run, request(3, 50, max_tokens=10))  # 15 of the 16 blocks
        stats = run.engine.stats()
        assert (stats.num_pinned_blocks, stats.num_pins_lost) == (0, 1)
        assert ask(run, turn(2, [*history, 1, 2], 4)) < 16


def test_the_pin_that_was_put_down_longest_ago_goes_first() -> None:
    with running(config()) as run:
        for key in (1, 2, 3):
            ask(run, turn(key, [key * 10 + i for i in range(9)], 4, key=key))
        ask(run, turn(4, [*(10 + i for i in range(9)), *run.tokens[1]], 2, key=1))  # the first one again: now the last
        assert run.engine.stats().num_pinned_blocks == 9
        ask(run, request(5, 33, max_tokens=1))  # 9 blocks; 7 are not pinned
        assert sorted(run.engine._scheduler.blocks.pins.pins) == [1, 3]


def test_a_lease_ends_by_itself_in_an_idle_engine() -> None:
    with running(config()) as run:
        ask(run, turn(1, 12, 5, lease=3.0))
        assert run.engine.next_deadline() == run.now + 3.0
        run.now += 2.0
        run.step()
        assert run.engine.stats().num_pinned_blocks == 4
        run.now += 1.0
        run.step()
        assert (run.engine.stats().num_pinned_blocks, run.engine.stats().num_pins_lost) == (0, 0)
        assert run.engine.next_deadline() is None


def test_a_turn_renews_the_lease_and_unpin_ends_it() -> None:
    with running(config()) as run:
        ask(run, turn(1, 8, 5))
        run.now += 9.0
        ask(run, turn(2, [*request(1, 8).prompt, *run.tokens[1]], 4))
        run.now += 9.0
        run.step()
        assert run.engine.stats().num_pinned_blocks == 4
        run.engine.unpin(7)
        run.engine.unpin(7)
        assert run.engine.stats().num_pinned_blocks == 0


@pytest.mark.parametrize("end", ["cancelled", "expired"])
def test_a_turn_that_is_cut_short_is_kept_too(end: str) -> None:
    with running(config()) as run:
        item = msgspec.structs.replace(turn(1, 12, 30), deadline=run.now + 5.0)
        run.engine.add(item)
        run.step(4)
        if end == "cancelled":
            run.engine.cancel(1)
        run.now += 6.0
        run.step()
        assert run.finishes[1].reason == end
        assert run.engine.stats().num_pinned_blocks == 3


def test_blocks_with_numbers_that_are_not_finite_are_not_kept() -> None:
    """They leave the pin of the turn before as well, which shared them."""
    with running(config()) as run:
        ask(run, turn(1, 12, 5))
        run.executor.has_nan = lambda sampling: sampling.seed == 2
        run.engine.add(turn(2, [*request(1, 12).prompt, *run.tokens[1]], 4))
        run.finish()
        assert (run.finishes[2].reason, run.engine.stats().num_pinned_blocks) == ("error", 0)


def test_a_pin_never_keeps_a_sequence_waiting() -> None:
    with running(config()) as run:
        ask(run, turn(1, 50, 10))
        assert run.engine.stats().num_pinned_blocks == 14
        ask(run, request(2, [3] * 50, max_tokens=14))


def test_credit_is_counted_to_the_token() -> None:
    with running(config()) as run:
        run.engine.add(credited(1, 6, 20, credit=3))
        run.finish()
        assert len(run.tokens[1]) == 3
        assert run.engine.stats().num_parked == 1
        run.engine.grant(1, 3)
        run.finish()
        assert len(run.tokens[1]) == 3
        run.engine.grant(1, 11)
        run.finish()
        assert len(run.tokens[1]) == 11
        run.engine.grant(1, 20)
        run.finish()
    assert run.tokens[1] == solo_tokens(request(1, 6).prompt, 1, 20)
    assert run.finishes[1].reason == "length"


def test_without_credit_nothing_is_computed() -> None:
    with running(config()) as run:
        run.engine.add(credited(1, 6, 5, credit=0))
        run.finish()
        assert run.executor.batches == []
        run.engine.grant(1, 1)
        run.engine.grant(99, 1)
        run.finish()
        assert len(run.tokens[1]) == 1
        run.engine.cancel(1)
        run.finish()
        assert run.finishes[1].reason == "cancelled"


def test_who_has_no_credit_holds_up_nobody() -> None:
    """4 places in a batch: 3 sequences without credit would take them all."""
    with running(config()) as run:
        for number in range(1, 4):
            run.engine.add(credited(number, 4, 30, credit=2))
        for number in range(4, 9):
            run.engine.add(request(number, 4, max_tokens=6))
        run.finish()
        assert [len(run.tokens[number]) for number in range(1, 9)] == [2, 2, 2, 6, 6, 6, 6, 6]
        for number in range(1, 4):
            run.engine.grant(number, 30)
        run.finish()
    assert all(run.tokens[n] == solo_tokens(request(n, 4).prompt, n, 30) for n in range(1, 4))


def test_credit_does_not_resume_what_is_paused_nor_resuming_what_has_no_credit() -> None:
    with running(config()) as run:
        run.engine.add(credited(1, 6, 8, credit=2))
        run.finish()
        run.engine.park(1)
        run.engine.grant(1, 4)
        run.finish()
        assert len(run.tokens[1]) == 2
        run.engine.unpark(1)
        run.finish()
        assert len(run.tokens[1]) == 4
        run.engine.unpark(1)
        run.finish()
        assert len(run.tokens[1]) == 4
        run.engine.grant(1, 8)
        run.finish()


def test_a_deadline_holds_without_credit() -> None:
    with running(config()) as run:
        run.engine.add(msgspec.structs.replace(credited(1, 6, 8, credit=2), deadline=run.now + 5.0))
        run.finish()
        run.now += 5.0
        run.step()
        assert run.finishes[1].reason == "expired"


def test_stop_tokens_change_from_the_next_token_on() -> None:
    expected = solo_tokens([1, 2], 1, 20)
    stop = next(token for i, token in enumerate(expected) if i > 6 and token not in expected[:i])
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], 20, stop_token_ids=(expected[4],)))
        run.step(3)
        run.engine.set_stop_tokens(1, [expected[0], stop])
        run.engine.set_stop_tokens(99, [1])
        with pytest.raises(InvalidSequenceError):
            run.engine.set_stop_tokens(1, [-1])
        run.finish()
    assert run.tokens[1] == expected[: expected.index(stop) + 1]
    assert run.finishes[1].stop_token_id == stop


def test_new_stop_tokens_are_banned_before_min_tokens_too() -> None:
    first = solo_tokens([1, 2], 1, 1)[0]
    with running(config()) as run:
        run.engine.add(request(1, [1, 2], 6, min_tokens=6))
        run.engine.set_stop_tokens(1, [first])
        run.finish()
    assert run.tokens[1][0] == choose([1, 2], 1, (first,))
