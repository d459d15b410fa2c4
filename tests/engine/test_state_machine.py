"""The engine under random use (machine.py), and proof that the machine would notice: each planted fault turns it red.

`HEADRACE_HYPOTHESIS=ci pytest tests/engine` runs 800 examples of each of the three machines, 100 rules each.
"""

from __future__ import annotations

import pytest
from headrace.engine import block_manager
from headrace.engine.block_manager import BlockManager, PrefixHit
from headrace.engine.scheduler import StepPlan
from headrace.engine.sequence import BlockContent, Sequence, Status
from headrace.engine.swap import HostPool
from headrace.engine.types import FinishReason, SamplingParams, SequenceOutput, TokenOutput
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from tests.engine.machine import EngineMachine
from tests.engine.session_machine import SessionMachine
from tests.engine.watched import WatchedScheduler


class PressureMachine(EngineMachine):
    """A pool that holds little more than one sequence, and steps that compute little: preemption all the time."""

    @initialize(pool_tokens=st.integers(18, 30), budget=st.integers(0, 1), host=st.sampled_from([0, 15, 60]))
    def start(self, pool_tokens: int, budget: int, host: int) -> None:
        self.set_up(block_size=1, pool_tokens=pool_tokens, num_seqs=4, budget=budget, host=host)


class RoomyMachine(EngineMachine):
    """A pool in which every prefix stays cached: hits all the time."""

    @initialize(budget=st.integers(4, 12))
    def start(self, budget: int) -> None:
        self.set_up(block_size=2, pool_tokens=200, num_seqs=3, budget=budget)


TestEngine = EngineMachine.TestCase
TestEngineUnderPressure = PressureMachine.TestCase
TestEngineWithSessions = SessionMachine.TestCase
setattr(TestEngine, "pytestmark", [pytest.mark.timeout(600)])  # noqa: B010  TestCase classes declare no such attribute
setattr(TestEngineUnderPressure, "pytestmark", [pytest.mark.timeout(600)])  # noqa: B010
setattr(TestEngineWithSessions, "pytestmark", [pytest.mark.timeout(600)])  # noqa: B010


class ForgetsOneFree(BlockManager):
    def release(self, seq: Sequence) -> None:
        del seq.block_table[-1:]
        super().release(seq)


class FreesTwice(BlockManager):
    def release(self, seq: Sequence) -> None:
        self.free.extend(seq.block_table[-1:])
        super().release(seq)


class HandsOutOwnedBlock(BlockManager):
    def _take_block(self) -> int:
        block = super()._take_block()
        if len(self.free) % 5 == 4:
            self.free.append(block)
        return block


class HandsOutNullBlock(BlockManager):
    def _take_block(self) -> int:
        return super()._take_block() if self.free else block_manager.NULL_BLOCK


class EvictsSharedBlock(BlockManager):
    """A hit does not count as a reference."""

    def allocate(self, seq: Sequence, hit: PrefixHit) -> None:
        super().allocate(seq, hit)
        for block in hit.blocks:
            self.ref_counts[block] = 1


class IgnoresSalt(BlockManager):
    def _full_blocks(self, seq: Sequence) -> list[BlockContent]:
        salt, seq.salt = seq.salt, ""
        contents = super()._full_blocks(seq)
        seq.salt = salt
        return contents


class IgnoresParent(BlockManager):
    """Equal tokens are a hit, whatever stands before them."""

    def _full_blocks(self, seq: Sequence) -> list[BlockContent]:
        super()._full_blocks(seq)
        root = block_manager.hash_salt(seq.salt)
        seq.full_blocks = [
            BlockContent(block_manager.hash_block(root, content.tokens), root, content.tokens)
            for content in seq.full_blocks
        ]
        return seq.full_blocks


class HitsWholePrompt(BlockManager):
    """Leaves no token to compute."""

    def lookup(self, seq: Sequence) -> PrefixHit:
        seq.tokens.append(0)
        try:
            return super().lookup(seq)
        finally:
            seq.tokens.pop()


class KeepsComputedCount(BlockManager):
    """Preemption forgets that the KV is gone."""

    def release(self, seq: Sequence) -> None:
        num_computed = seq.num_computed
        super().release(seq)
        seq.num_computed = num_computed


class KeepsNanBlocks(BlockManager):
    def forget(self, seq: Sequence) -> None:
        pass


class RegistersBeforeSuccess(WatchedScheduler):
    def schedule(self, now: float) -> StepPlan:
        plan = super().schedule(now)
        for item in plan.sequences:
            item.seq.num_computed += item.num_tokens
            self.blocks.register_computed(item.seq)
            item.seq.num_computed -= item.num_tokens
        return plan


class AnswersTwice(WatchedScheduler):
    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        super().finish(seq, reason, now)
        self.outputs.append(self.outputs[-1])


class NeverAnswersCancelled(WatchedScheduler):
    def finish(self, seq: Sequence, reason: FinishReason, now: float) -> None:
        super().finish(seq, reason, now)
        if reason == "cancelled":
            self.outputs.pop()


class SchedulesExpired(WatchedScheduler):
    def expire(self, now: float) -> None:
        pass


class SchedulesParked(WatchedScheduler):
    def schedule(self, now: float) -> StepPlan:
        for seq in list(self.parked.values()):
            self.unpark(seq)
        return super().schedule(now)


class Thrashes(WatchedScheduler):
    """Preempts whoever is youngest, progress or not."""

    def _victim(self, seq: Sequence) -> Sequence | None:
        return self.running[-1] if self.running[-1] is not seq else super()._victim(seq)


class ServesLastComeFirst(WatchedScheduler):
    def add(self, seq: Sequence) -> None:
        self.live[seq.id] = seq
        self.waiting.insert(0, seq)


class ForgetsParked(WatchedScheduler):
    """Unparking leaves a sequence in nobody's queue."""

    def unpark(self, seq: Sequence) -> None:
        super().unpark(seq)
        if seq.status is Status.WAITING and seq.block_table:
            self.waiting.remove(seq)


class LosesTokens(WatchedScheduler):
    """Preemption throws outputs away and makes them again."""

    def _preempt(self, seq: Sequence) -> None:
        super()._preempt(seq)
        del seq.tokens[len(seq.prompt) :], seq.outputs[:], seq.full_blocks[:]


class IgnoresStopTokens(WatchedScheduler):
    """On the first token."""

    def _append(self, seq: Sequence, tokens: list[TokenOutput], now: float) -> SequenceOutput:
        sampling = seq.sampling
        if not seq.outputs:
            seq.sampling = SamplingParams(max_tokens=sampling.max_tokens)
        try:
            return super()._append(seq, tokens, now)
        finally:
            seq.sampling = sampling


class RunsTooMany(WatchedScheduler):
    def schedule(self, now: float) -> StepPlan:
        object.__setattr__(self.config, "max_num_seqs", self.config.max_num_seqs + 1)
        try:
            return super().schedule(now)
        finally:
            object.__setattr__(self.config, "max_num_seqs", self.config.max_num_seqs - 1)


class LosesWhatRested(BlockManager):
    """A pin that ends takes its blocks with it."""

    def unpin(self, key: int) -> None:
        self.resting = dict.fromkeys(set(self.resting) - set(self.pins.drop(key)))


class KeepsPinsOfNanBlocks(BlockManager):
    def _unregister(self, block: int) -> None:
        content = self.contents[block]
        if content is not None:
            del self.cached[content.hash]
            self.contents[block] = None


class HoldsOnToPins(BlockManager):
    """Others wait until the lease ends."""

    @property
    def num_free(self) -> int:
        return super().num_free - len(self.resting)


class NeverEndsALease(BlockManager):
    def end_leases(self, now: float) -> None:
        pass


class IgnoresCredit(WatchedScheduler):
    def _append(self, seq: Sequence, tokens: list[TokenOutput], now: float) -> SequenceOutput:
        seq.credit += 1
        return super()._append(seq, tokens, now)


class ResumesWithoutCredit(WatchedScheduler):
    def unpark(self, seq: Sequence) -> None:
        seq.credit = max(seq.credit, len(seq.outputs) + 1)
        super().unpark(seq)


class ForgetsThatItIsPaused(WatchedScheduler):
    def grant(self, seq: Sequence, credit: int) -> None:
        seq.is_held = False
        super().grant(seq, credit)


class BringsNothingBack(HostPool):
    def bring_back(self, seq: Sequence) -> None:
        before = len(self.decided)
        super().bring_back(seq)
        del self.decided[before:]


class BringsBackToTheWrongPlace(HostPool):
    def bring_back(self, seq: Sequence) -> None:
        seq.host_table.reverse()
        super().bring_back(seq)


class KeepsHostBlocksOfTheEnded(HostPool):
    def drop(self, seq: Sequence) -> None:
        if seq.block_table:
            super().drop(seq)


class HandsOutHostBlockTwice(HostPool):
    def take(self, seq: Sequence) -> None:
        super().take(seq)
        if seq.host_table and len(self.free) % 3 == 0:
            self.free.append(seq.host_table[0])


class KeepsTooMuch(HostPool):
    """Counts a token whose KV was not computed yet."""

    def take(self, seq: Sequence) -> None:
        super().take(seq)
        if seq.host_table:
            seq.num_swapped = min(seq.num_swapped + 1, seq.num_to_compute)


FAULTS: dict[type[BlockManager | WatchedScheduler | HostPool], type[EngineMachine]] = {
    ForgetsOneFree: EngineMachine,
    FreesTwice: EngineMachine,
    HandsOutOwnedBlock: EngineMachine,
    HandsOutNullBlock: PressureMachine,
    EvictsSharedBlock: RoomyMachine,
    IgnoresSalt: RoomyMachine,
    IgnoresParent: RoomyMachine,
    HitsWholePrompt: EngineMachine,
    KeepsComputedCount: PressureMachine,
    KeepsNanBlocks: RoomyMachine,
    RegistersBeforeSuccess: RoomyMachine,
    AnswersTwice: EngineMachine,
    NeverAnswersCancelled: EngineMachine,
    SchedulesExpired: EngineMachine,
    SchedulesParked: EngineMachine,
    Thrashes: PressureMachine,
    ServesLastComeFirst: EngineMachine,
    ForgetsParked: EngineMachine,
    LosesTokens: PressureMachine,
    IgnoresStopTokens: EngineMachine,
    RunsTooMany: EngineMachine,
    LosesWhatRested: SessionMachine,
    KeepsPinsOfNanBlocks: SessionMachine,
    HoldsOnToPins: SessionMachine,
    NeverEndsALease: SessionMachine,
    IgnoresCredit: SessionMachine,
    ResumesWithoutCredit: SessionMachine,
    ForgetsThatItIsPaused: SessionMachine,
    BringsNothingBack: PressureMachine,
    BringsBackToTheWrongPlace: PressureMachine,
    KeepsHostBlocksOfTheEnded: PressureMachine,
    HandsOutHostBlockTwice: PressureMachine,
    KeepsTooMuch: PressureMachine,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_machine_finds_planted_faults(fault: type[BlockManager | WatchedScheduler | HostPool]) -> None:
    attributes = {BlockManager: "blocks_class", WatchedScheduler: "scheduler_class", HostPool: "host_class"}
    attribute = next(name for base, name in attributes.items() if issubclass(fault, base))
    faulty = type("Faulty", (FAULTS[fault],), {attribute: fault})
    search = settings(
        max_examples=1000, stateful_step_count=50, phases=[Phase.generate], derandomize=True, print_blob=False
    )
    with pytest.raises(Exception):  # noqa: B017, PT011  an invariant, or whatever the fault breaks first
        run_state_machine_as_test(faulty, settings=search)
