"""The state machine of machine.py with what sessions do: turns that pin their KV, credit, new stop tokens in flight.

Run by test_state_machine.py.
"""

from __future__ import annotations

import msgspec
from headrace.engine.types import SequenceRequest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from tests.engine.machine import PICK, STOP_TOKENS, EngineMachine

LEASES = (0.0, 1.0, 2.0, 50.0)


class SessionMachine(EngineMachine):
    """A pool in which what is pinned is needed now and then."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        pool_tokens=st.sampled_from([24, 40, 60, 120]),
        budget=st.integers(0, 12),
        host=st.sampled_from([0, 0, 15]),
    )
    def start(self, block_size: int, pool_tokens: int, budget: int, host: int) -> None:
        self.set_up(block_size, pool_tokens, num_seqs=3, budget=budget, host=host)

    def add_request(self, request: SequenceRequest) -> None:
        """Most belong to one of four conversations; every third has credit for a few tokens."""
        number = request.id
        request = msgspec.structs.replace(
            request,
            conversation=0 if request.score else number % 5,
            lease=LEASES[number % 4],
            credit=number % 7 if number % 3 == 0 and not request.score else -1,
        )
        super().add_request(request)
        if number in self.live and request.credit >= 0:
            self.live[number].credit = request.credit

    @rule(pick=PICK)
    def next_turn(self, pick: int) -> None:
        """Go on from what a sequence that has ended had, whole or cut, as a session does."""
        ended = [e for e in self.seqs.values() if e.finish is not None and e.tokens]
        if ended:
            last = ended[pick % len(ended)]
            self.add_request(
                SequenceRequest(
                    id=len(self.seqs),
                    prompt=[*last.request.prompt, *last.tokens[: pick or None], 1, 2],
                    sampling=msgspec.structs.replace(last.request.sampling, seed=len(self.seqs), max_tokens=4),
                    salt=last.request.salt,
                    arrival=self.now,
                )
            )

    @rule(pick=PICK, kind=st.sampled_from(["grant", "grant", "unpin", "stops"]), count=st.integers(0, 6))
    def talk(self, pick: int, kind: str, count: int) -> None:
        self.engine.grant(10_000, 1)
        self.engine.set_stop_tokens(10_000, [1])
        seq = self.pick(pick)
        if kind == "unpin":
            self.engine.unpin(pick % 5)
        elif seq is not None and kind == "grant":
            expected = self.live[seq.id]
            expected.credit += pick
            self.engine.grant(seq.id, expected.credit)
        elif seq is not None:
            stops = STOP_TOKENS[pick % len(STOP_TOKENS)]
            self.engine.set_stop_tokens(seq.id, stops)
            expected = self.live[seq.id]
            changed = msgspec.structs.replace(expected.request.sampling, stop_token_ids=stops)
            expected.request = msgspec.structs.replace(expected.request, sampling=changed)
        self.step(count)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "engine"):
            self.now += 100.0
            self.engine.step()
            self.engine.check_integrity()
            assert not self.scheduler.blocks.resting, "17: blocks rest after the last lease"
