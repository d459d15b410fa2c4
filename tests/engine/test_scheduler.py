"""Scheduling decisions small enough to work out by hand. A plan is a list of (id, first position, tokens)."""

from __future__ import annotations

from headrace.engine.sequence import Status

from tests.engine.support import Steps, config, request


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    steps = Steps(config())
    (seq,) = steps.add(request(1, 20, max_tokens=2))
    assert steps.plan() == [(1, 0, 8)]
    assert seq.outputs == []
    assert steps.plan() == [(1, 8, 8)]
    assert steps.plan() == [(1, 16, 4)]
    assert seq.outputs == [1]
    assert steps.plan() == [(1, 20, 1)]
    assert steps.plan() == []


def test_decodes_go_first_and_a_prompt_gets_what_they_leave() -> None:
    steps = Steps(config())
    steps.add(request(1, 3), request(2, 3))
    assert steps.plan() == [(1, 0, 3), (2, 0, 3)]
    steps.add(request(3, 20))
    assert steps.plan() == [(1, 3, 1), (2, 3, 1), (3, 0, 6)]
    assert steps.plan() == [(1, 4, 1), (2, 4, 1), (3, 6, 6)]


def test_a_short_prompt_does_not_overtake_a_long_one() -> None:
    steps = Steps(config())
    steps.add(request(1, 20), request(2, 2))
    assert steps.plan() == [(1, 0, 8)]
    assert steps.plan() == [(1, 8, 8)]
    assert steps.plan() == [(1, 16, 4), (2, 0, 2)]
    assert steps.plan() == [(1, 20, 1), (2, 2, 1)]


def test_no_more_than_max_num_seqs_run() -> None:
    steps = Steps(config(max_num_seqs=2))
    steps.add(request(1, 1, max_tokens=2), request(2, 1), request(3, 1))
    assert steps.plan() == [(1, 0, 1), (2, 0, 1)]
    assert steps.plan() == [(1, 1, 1), (2, 1, 1)]
    assert steps.plan() == [(2, 2, 1), (3, 0, 1)]


def test_preemption_takes_from_the_youngest_who_recomputes_before_anyone_new() -> None:
    # 8 blocks of one token: every new token needs a block.
    steps = Steps(config(num_blocks=9, block_size=1, max_num_batched_tokens=16, enable_prefix_cache=False))
    _, young = steps.add(request(1, 2, max_tokens=6), request(2, 3, max_tokens=4))
    assert steps.plan() == [(1, 0, 2), (2, 0, 3)]
    assert steps.plan() == [(1, 2, 1), (2, 3, 1)]  # 1 block is free
    assert steps.plan() == [(1, 3, 1)]  # 1 takes it; 2 has nobody to take from, and waits a step
    assert steps.scheduler.num_preemptions == 0
    assert steps.plan() == [(1, 4, 1)]  # 1 takes the blocks of 2
    assert (steps.scheduler.num_preemptions, young.block_table, young.outputs) == (1, [], [1, 1])
    steps.add(request(3, 1))
    assert steps.plan() == [(1, 5, 1)]  # 2 blocks are free: 2 does not fit, and 3 does not overtake it
    assert steps.plan() == [(1, 6, 1)]
    assert steps.plan() == [(2, 0, 5), (3, 0, 1)]  # its prompt and both outputs again, in one go
    assert young.outputs == [1, 1, 1]


def test_admission_spares_a_block_for_everyone_who_runs() -> None:
    steps = Steps(config(num_blocks=5, max_num_batched_tokens=16))
    steps.add(request(1, 4, max_tokens=1), request(2, 4, max_tokens=1), request(3, 4))
    assert steps.plan() == [(1, 0, 4), (2, 0, 4)]  # 3 would fit, and leave 1 block for two
    assert steps.plan() == [(3, 0, 4)]


def test_nobody_is_preempted_again_before_it_has_delivered_something() -> None:
    steps = Steps(config(num_blocks=41, block_size=1, max_num_batched_tokens=4, enable_prefix_cache=False))
    old, young = steps.add(request(1, 2, max_tokens=30), request(2, 5))
    steps.plan()
    steps.plan()
    assert steps.scheduler._victim(old) is young
    steps.scheduler._preempt(young)
    assert steps.plan() == [(1, 3, 1), (2, 0, 3)]
    assert steps.scheduler._victim(old) is None
    assert steps.plan() == [(1, 4, 1), (2, 3, 3)]
    assert steps.scheduler._victim(old) is young


def test_a_prompt_that_loses_its_blocks_is_not_computed_in_the_same_step() -> None:
    # 10 blocks of one token. 2 is admitted into 8 of them with one to spare, and is computed 2 tokens a step.
    steps = Steps(config(num_blocks=11, block_size=1, max_num_batched_tokens=3, max_num_seqs=2, max_logit_rows=2))
    steps.add(request(1, 1, max_tokens=9), request(2, 8, max_tokens=1))
    assert steps.plan() == [(1, 0, 1), (2, 0, 2)]
    assert steps.plan() == [(1, 1, 1), (2, 2, 2)]
    assert steps.plan() == [(1, 2, 1)]
    assert steps.scheduler.num_preemptions == 1


def test_a_text_to_score_is_not_scored_again_after_preemption() -> None:
    steps = Steps(config(max_num_batched_tokens=4))
    (seq,) = steps.add(request(1, 12, score=True))
    steps.plan()
    steps.plan()
    assert seq.num_scored == 8
    steps.scheduler._preempt(seq)
    wanted = []
    while seq.status is not Status.FINISHED:
        plan = steps.scheduler.schedule(0.0)
        wanted.append(plan.num_logits)
        steps.update(plan)
    assert wanted == [0, 0, 3]


def test_logits_rows_bound_the_chunks_of_a_text_to_score() -> None:
    steps = Steps(config())
    steps.add(request(1, 11, score=True), request(2, 2))
    assert steps.plan() == [(1, 0, 4)]  # 4 rows; the last token needs none, so 10 positions in all
    assert steps.plan() == [(1, 4, 4)]
    assert steps.plan() == [(1, 8, 2), (2, 0, 2)]
    assert steps.plan() == [(2, 2, 1)]


def test_a_decode_is_never_starved_by_a_text_to_score() -> None:
    steps = Steps(config())
    steps.add(request(1, 2), request(2, 20, score=True))
    assert steps.plan() == [(1, 0, 2), (2, 0, 3)]
    assert steps.plan() == [(1, 2, 1), (2, 3, 3)]


def test_a_cached_prefix_is_not_computed_again() -> None:
    steps = Steps(config(max_num_batched_tokens=16))
    prompt = list(range(10))
    steps.add(request(1, prompt, max_tokens=1))
    assert steps.plan() == [(1, 0, 10)]
    (seq,) = steps.add(request(2, prompt, max_tokens=1))
    assert steps.plan() == [(2, 8, 2)]
    assert seq.num_cached_tokens == 8
    assert (steps.scheduler.num_prefix_queries, steps.scheduler.num_prefix_hits) == (20, 8)


def test_the_last_token_of_a_cached_prompt_is_computed() -> None:
    steps = Steps(config())
    prompt = list(range(8))
    steps.add(request(1, prompt, max_tokens=1))
    assert steps.plan() == [(1, 0, 8)]
    steps.add(request(2, prompt, max_tokens=1))
    assert steps.plan() == [(2, 4, 4)]


def test_a_sequence_waits_for_a_prefix_that_another_computes() -> None:
    steps = Steps(config(max_num_batched_tokens=32))
    prompt = list(range(10))
    steps.add(request(1, prompt), request(2, prompt), request(3, prompt))
    assert steps.plan() == [(1, 0, 10)]
    assert steps.plan() == [(1, 10, 1), (2, 8, 2), (3, 8, 2)]


def test_a_sequence_does_not_wait_for_one_that_is_parked() -> None:
    steps = Steps(config())
    prompt = list(range(12))
    first, _ = steps.add(request(1, prompt), request(2, prompt))
    assert steps.plan() == [(1, 0, 8)]
    steps.scheduler.park(first)
    assert steps.plan() == [(2, 8, 4)]


def test_outputs_are_shared_too() -> None:
    steps = Steps(config())
    prompt = list(range(6))
    steps.add(request(1, prompt, max_tokens=3))
    for _ in range(3):
        steps.plan()
    steps.add(request(2, [*prompt, 1, 1, 1, 7]))
    assert steps.plan() == [(2, 8, 2)]


def test_nobody_waits_for_a_text_to_score_that_ends_inside_a_block() -> None:
    steps = Steps(config(max_logit_rows=4, max_num_batched_tokens=4))
    steps.add(request(1, list(range(8)), score=True), request(2, [*range(8), 9]))
    assert steps.plan() == [(1, 0, 4)]
    assert steps.plan() == [(1, 4, 3), (2, 4, 1)]


def test_a_parked_sequence_keeps_its_blocks_while_nobody_needs_them() -> None:
    steps = Steps(config())
    first, _ = steps.add(request(1, 6), request(2, 2))
    assert steps.plan() == [(1, 0, 6), (2, 0, 2)]
    steps.scheduler.park(first)
    assert steps.plan() == [(2, 2, 1)]
    steps.scheduler.unpark(first)
    assert steps.plan() == [(2, 3, 1), (1, 6, 1)]
    assert steps.plan() == [(1, 7, 1), (2, 4, 1)]
    assert steps.scheduler.num_preemptions == 0


def test_a_waiting_sequence_takes_the_blocks_of_a_parked_one() -> None:
    steps = Steps(config(num_blocks=5))
    (parked,) = steps.add(request(1, 8, max_tokens=4))
    assert steps.plan() == [(1, 0, 8)]
    steps.scheduler.park(parked)
    steps.add(request(2, 9, max_tokens=1))
    assert steps.plan() == [(2, 0, 8)]
    assert (parked.block_table, steps.scheduler.num_preemptions) == ([], 1)
    assert steps.plan() == [(2, 8, 1)]
    steps.scheduler.unpark(parked)
    assert steps.plan()[0][0] == 1


def test_blocks_are_not_taken_in_vain() -> None:
    steps = Steps(config(num_blocks=7, max_num_seqs=2, max_num_batched_tokens=16, enable_prefix_cache=False))
    parked, _ = steps.add(request(1, 4), request(2, 8))
    steps.plan()
    steps.scheduler.park(parked)
    steps.add(request(3, 16, max_tokens=1))  # 4 blocks; 2 are free, 1 is parked
    assert steps.plan() == [(2, 8, 1)]
    assert len(parked.block_table) == 1


def test_parked_sequences_leave_their_places_to_others() -> None:
    steps = Steps(config(max_num_seqs=1, max_logit_rows=1))
    first, _ = steps.add(request(1, 2), request(2, 2))
    steps.plan()
    steps.scheduler.park(first)
    assert steps.plan() == [(2, 0, 2)]
    steps.scheduler.unpark(first)
    assert steps.plan() == [(2, 2, 1)]  # 1 waits for a place


def test_an_empty_plan_computes_nothing() -> None:
    steps = Steps(config())
    plan = steps.scheduler.schedule(0.0)
    assert (plan.sequences, plan.num_tokens, plan.num_logits) == ((), 0, 0)


def test_a_plan_counts_its_tokens_and_rows() -> None:
    steps = Steps(config())
    steps.add(request(1, 3), request(2, 9))
    plan = steps.scheduler.schedule(0.0)
    assert (plan.num_tokens, plan.num_logits) == (8, 1)
