"""A traced sequence tells what happened to it and when; others tell nothing and cost nothing."""

from __future__ import annotations

import msgspec
from headrace.engine.types import SequenceRequest, TimelineEvent

from tests.engine.support import Run, config, request, running


def traced(*arguments: object, **changes: object) -> SequenceRequest:
    return msgspec.structs.replace(request(*arguments, **changes), is_traced=True)  # type: ignore[arg-type]


def tick(run: Run, at: float) -> None:
    run.now = at
    run.step()


def kinds(events: tuple[TimelineEvent, ...]) -> list[tuple[str, int, int]]:
    return [(event.kind, event.num_tokens, event.step) for event in events]


def test_each_chunk_of_a_prompt_and_no_decode() -> None:
    with running(config(max_num_batched_tokens=8)) as run:
        run.engine.add(traced(1, 20, max_tokens=3))
        run.engine.add(request(2, 3, max_tokens=1))
        for step in range(6):
            tick(run, 50.0 + step)
        assert kinds(run.finishes[1].timeline) == [("prefill", 8, 1), ("prefill", 8, 2), ("prefill", 4, 3)]
        assert [event.at for event in run.finishes[1].timeline] == [50.0, 51.0, 52.0]
        assert run.finishes[2].timeline == ()
        record = run.engine.last_step
        assert record is not None
        assert (record.number, record.num_tokens, record.num_sequences, record.traced) == (5, 1, 1, (1,))


def test_parked_and_resumed() -> None:
    with running(config()) as run:
        run.engine.add(traced(1, 4, max_tokens=4))
        tick(run, 50.0)
        run.now = 51.0
        run.engine.park(1)
        run.now = 52.0
        run.engine.unpark(1)
        tick(run, 53.0)
        run.finish()
        events = [(event.kind, event.at) for event in run.finishes[1].timeline]
        assert events == [("prefill", 50.0), ("parked", 51.0), ("resumed", 53.0)]


def test_preempted_and_computed_again() -> None:
    with running(config(num_blocks=7, max_num_batched_tokens=16)) as run:
        run.engine.add(request(1, 8, max_tokens=12))
        run.engine.add(traced(2, 8, max_tokens=12))
        run.finish()
        told = [event.kind for event in run.finishes[2].timeline]
        assert told[:1] == ["prefill"]
        assert told.count("preempted") == told.count("resumed") == run.engine.stats().num_preemptions > 0
        assert told[told.index("resumed") + 1] == "prefill"


def test_a_timeline_does_not_grow_without_bound() -> None:
    with running(config()) as run:
        run.engine.add(traced(1, 4, max_tokens=40))
        run.step()
        for _ in range(300):
            run.engine.park(1)
            run.engine.unpark(1)
        run.finish()
        assert len(run.finishes[1].timeline) == 256
