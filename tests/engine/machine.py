"""A hypothesis state machine over the whole Engine, and the invariants that it asserts by number.

The numbers are those of the project's list of scheduler and block-manager invariants:

 1 free + referenced + evictable = all blocks; the null block is never used       check_integrity
 2 reference counts are those of the tables                                       check_integrity
 3 a shared block is full, immutable, of one salt and of equal tokens             check_integrity, oracle
 4 tables are as long as their tokens need                                        check_integrity
 5 ended sequences own nothing within one step                                    _check_step, cancel
 6 one terminal event each; tokens without gap or repeat; nothing after the end   _check_output
 7 token budget, max_num_seqs, rows of logits and queue caps hold                 _check_step, add_request
 8 expired, cancelled, parked sequences and those without credit do not run       _check_step, check_integrity
 9 everything ends; a step with work does work; equals: first come, first served  _check_step, teardown
   nobody is preempted twice without progress                                     WatchedScheduler
10 chunks, hits, preemption, parking, retries and neighbours change no token      _check_output (oracle)
11 cancel is exact, idempotent and ignores unknown ids; ids in use are refused    cancel, nudge, add_request
12 reused blocks leave no state: free blocks are poisoned before every step       run_step, oracle
13 salts never share a block                                                      check_integrity
14 nothing is remembered of what ended; at the end all blocks are free            _check_step, teardown
15 whoever holds blocks and does not run gives them up under pressure             9, for parked sequences
16 free + used = all host blocks; KV that comes back from there is what left      check_integrity, oracle, teardown
17 what conversations pin is cached, counts as free, and is let go when needed    check_integrity, session_machine
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import pytest
from headrace.engine.block_manager import BlockManager
from headrace.engine.config import EngineConfig
from headrace.engine.errors import InvalidSequenceError, QueueFullError
from headrace.engine.sequence import Sequence
from headrace.engine.swap import HostPool
from headrace.engine.types import FinishOutput, SamplingParams, SequenceOutput, SequenceRequest
from headrace.kernels.batch import RowSampling, StepBatch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.engine.oracle import POISON, VOCAB, OracleExecutor, choose, score
from tests.engine.watched import WatchedEngine, WatchedScheduler

BASES = [[(base * 17 + i * (base + 3)) % VOCAB for i in range(24)] for base in range(3)]
STOP_TOKENS = ((), (), (4, 11, 23), tuple(range(0, VOCAB, 3)))
STEP_SECONDS = 0.25
PICK = st.integers(0, 15)


@dataclass
class Expected:
    """What the test knows of one accepted sequence."""

    request: SequenceRequest
    max_tokens: int
    submitted_at: float
    tokens: list[int] = field(default_factory=list)
    num_scored: int = 0
    end: str | None = None  # the reason it must end with in the next step
    error: str | None = None
    is_parked: bool = False
    credit: int = 10_000
    finish: FinishOutput | None = None

    @property
    def may_run(self) -> bool:
        return not self.is_parked and len(self.tokens) < self.credit


class EngineMachine(RuleBasedStateMachine):
    """Subclasses plant faults by naming other classes."""

    scheduler_class: type[WatchedScheduler] = WatchedScheduler
    blocks_class: type[BlockManager] = BlockManager
    host_class: type[HostPool] = HostPool

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        pool_tokens=st.sampled_from([16, 24, 31, 40, 60]),
        num_seqs=st.integers(1, 5),
        budget=st.integers(0, 12),
        rows=st.integers(0, 4),
        has_cache=st.sampled_from([True, True, True, False]),
        host=st.sampled_from([0, 5, 40]),
    )
    def start(
        self, block_size: int, pool_tokens: int, num_seqs: int, budget: int, rows: int, has_cache: bool, host: int
    ) -> None:
        self.set_up(block_size, pool_tokens, num_seqs, budget, rows, has_cache, host)

    def set_up(
        self,
        block_size: int,
        pool_tokens: int,
        num_seqs: int,
        budget: int,
        rows: int = 2,
        has_cache: bool = True,
        host: int = 0,
    ) -> None:
        """An idle engine. budget and rows (of logits): beyond one per running sequence; host: blocks of host memory."""
        num_blocks = pool_tokens // block_size + 1
        self.config = EngineConfig(
            num_blocks=num_blocks,
            max_model_len=50,
            block_size=block_size,
            max_num_batched_tokens=num_seqs + budget,
            max_num_seqs=num_seqs,
            max_logit_rows=num_seqs + rows,
            max_waiting_seqs=8,
            max_waiting_tokens=100,
            enable_prefix_cache=has_cache,
            vocab_size=VOCAB,
            num_host_blocks=host,
            min_swap_tokens=2,
        )
        self.log = logging.getLogger("headrace.engine.engine")
        self.log.disabled = True  # planted failures would fill it
        self.now = 100.0
        self.executor = OracleExecutor(num_blocks, block_size, host)
        self.engine = WatchedEngine(self.executor, self.config, lambda: self.now)
        self.scheduler = self.engine._scheduler = self.scheduler_class(self.config)
        self.scheduler.blocks = self.blocks_class(self.config.num_blocks, block_size, has_cache)
        self.scheduler.host = self.host_class(self.config)
        self.seqs: dict[int, Expected] = {}
        self.live: dict[int, Expected] = {}

    # --- rules

    @rule(
        base=st.integers(0, 2),
        length=st.sampled_from([*range(11), 16, 24]),
        tail=st.lists(st.integers(0, 2), max_size=2),
        salts=st.sampled_from([("",), ("", ""), ("", "", ""), ("a",), ("", "a"), ("a", "b", "a")]),
        max_tokens=st.integers(1, 30),
        stop=st.sampled_from(STOP_TOKENS),
        options=st.integers(0, 31),
    )
    def add(
        self,
        base: int,
        length: int,
        tail: list[int],
        salts: tuple[str, ...],
        max_tokens: int,
        stop: tuple[int, ...],
        options: int,
    ) -> None:
        """options: bits for a deadline (2), minimum (1), log-probabilities (1); above 28: scoring."""
        for salt in salts:
            number = len(self.seqs)
            request = SequenceRequest(
                id=number,
                prompt=BASES[base][:length] + tail,
                sampling=SamplingParams(
                    max_tokens=max_tokens,
                    seed=number,
                    stop_token_ids=stop,
                    min_tokens=3 if options & 4 else 0,
                    num_logprobs=0 if options & 8 else -1,
                ),
                salt=salt,
                deadline=self.now + max_tokens * STEP_SECONDS if options & 3 == 3 else None,
                score=options >= 28,
                arrival=self.now,
                priority=number // 2 % 3,  # type: ignore[arg-type]
                tenant=str(number % 2),
            )
            self.add_request(request)

    def add_request(self, request: SequenceRequest) -> None:
        num_prompt, output = len(request.prompt), 0 if request.score else request.sampling.max_tokens
        queued = [*self.scheduler.waiting, *self.scheduler.parked.values()]
        if num_prompt < 1 + request.score or num_prompt + output > self.config.max_sequence_len:
            with pytest.raises(InvalidSequenceError):
                self.engine.add(request)
        elif (
            len(queued) >= self.config.max_waiting_seqs
            or sum(len(seq.tokens) for seq in queued) + num_prompt > self.config.max_waiting_tokens
        ):
            with pytest.raises(QueueFullError):
                self.engine.add(request)
        else:
            self.engine.add(request)
            self.seqs[request.id] = self.live[request.id] = Expected(request, output, self.now)
            with pytest.raises(InvalidSequenceError):  # 11
                self.engine.add(request)

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.run_step()

    @rule(pick=PICK, kind=st.sampled_from(["nan", "fails", "fails once", "cancel", "jump"]), count=st.integers(0, 6))
    def harm(self, pick: int, kind: str, count: int) -> None:
        seq = self.pick(pick)
        if kind == "jump":
            self.now += pick / 2
        elif seq is not None and kind == "cancel":
            self.cancel(seq)
        elif seq is not None and kind == "nan":
            self.step_with_nan(seq)
        elif seq is not None:
            self.step_with_failure(seq, is_lasting=kind == "fails")
        self.step(count)

    @rule(pick=PICK, kind=st.sampled_from(["park", "unpark", "unpark", "max_tokens"]), count=st.integers(0, 6))
    def nudge(self, pick: int, kind: str, count: int) -> None:
        for number in (-1, 10_000):  # 11
            self.engine.cancel(number)
            self.engine.park(number)
            self.engine.unpark(number)
            self.engine.set_max_tokens(number, 1)
        seq = self.pick(pick)
        if seq is not None and kind == "max_tokens":
            self.set_max_tokens(seq, max_tokens=pick + 1)
        elif seq is not None:
            (self.engine.park if kind == "park" else self.engine.unpark)(seq.id)
            self.live[seq.id].is_parked = kind == "park"
        self.step(count)

    def step_with_nan(self, guilty: Sequence) -> None:
        def has_nan(sampling: RowSampling) -> bool:
            if sampling.seed != guilty.id:
                return False
            self.live[guilty.id].end, self.live[guilty.id].error = "error", "NUMERIC"
            for block in guilty.block_table:  # it may have been NaN for some steps: nothing of it may be shared
                if self.scheduler.blocks.ref_counts[block] == 1:
                    self.poison(block)
            return True

        self.executor.has_nan = has_nan
        self.run_step()
        self.executor.has_nan = lambda sampling: False

    def step_with_failure(self, guilty: Sequence, is_lasting: bool) -> None:
        size = self.config.block_size

        def fail(batch: StepBatch) -> None:
            if len(guilty.block_table) * size <= guilty.num_computed:
                return
            slot = guilty.block_table[guilty.num_computed // size] * size + guilty.num_computed % size
            if slot in batch.slot_mapping.tolist():
                if is_lasting or len(batch.seq_lens) == 1:
                    self.live[guilty.id].end, self.live[guilty.id].error = "error", "STEP_FAILED"
                else:
                    self.executor.fail = lambda batch: None
                self.executor.slots[slot] = POISON
                raise RuntimeError("planted")

        self.executor.fail = fail
        self.run_step()
        self.executor.fail = lambda batch: None

    def cancel(self, seq: Sequence) -> None:
        self.live[seq.id].end = "cancelled"
        self.engine.cancel(seq.id)
        assert not seq.block_table, "5: a cancelled sequence holds blocks"
        self.engine.cancel(seq.id)
        ended = [number for number, expected in self.seqs.items() if expected.finish is not None]
        if ended:
            self.engine.cancel(ended[-1])

    def set_max_tokens(self, seq: Sequence, max_tokens: int) -> None:
        if seq.is_score or len(seq.prompt) + max_tokens > self.config.max_sequence_len:
            with pytest.raises(InvalidSequenceError):
                self.engine.set_max_tokens(seq.id, max_tokens)
            return
        self.engine.set_max_tokens(seq.id, max_tokens)
        self.live[seq.id].max_tokens = max_tokens
        if len(self.live[seq.id].tokens) >= max_tokens:
            self.live[seq.id].end = "length"

    def pick(self, pick: int) -> Sequence | None:
        candidates = list(self.scheduler.live.values())
        return candidates[pick % len(candidates)] if candidates else None

    def poison(self, block: int) -> None:
        begin = block * self.config.block_size
        self.executor.slots[begin : begin + self.config.block_size] = [POISON] * self.config.block_size

    # --- one step and what must hold of it

    def run_step(self) -> None:
        for block in self.scheduler.blocks.free:  # 12
            self.poison(block)
        for expected in self.live.values():
            deadline = expected.request.deadline
            if deadline is not None and deadline <= self.now and expected.end is None:
                expected.end = "expired"
        self.engine.planned = ()
        self.executor.batches.clear()
        started_at = self.now
        doomed = {number for number, expected in self.live.items() if expected.end}
        self.held = {number for number, expected in self.live.items() if not expected.may_run}
        outputs = self.engine.step()
        if self.engine.planned:
            self.now += STEP_SECONDS
        assert len({output.id for output in outputs}) == len(outputs), "6: two outputs for one sequence in one step"
        for output in outputs:
            self._check_output(output, started_at)
        self._check_step(started_at, doomed)

    def _check_output(self, output: SequenceOutput, started_at: float) -> None:
        expected = self.live.get(output.id)
        assert expected is not None, "6: output of a sequence that has ended"
        request, must_stop = expected.request, False
        for token in output.tokens:
            has_logprob = request.score or request.sampling.num_logprobs >= 0
            if request.score:
                expected.num_scored += 1
                prefix, right = request.prompt[: expected.num_scored], request.prompt[expected.num_scored]
            else:
                is_banned = len(expected.tokens) < request.sampling.min_tokens
                prefix = request.prompt + expected.tokens
                right = choose(prefix, request.id, request.sampling.stop_token_ids if is_banned else ())
                expected.tokens.append(right)
            assert token.token_id == right, "10: not the token that it would have got alone"
            assert token.logprob == (score(prefix, right) if has_logprob else None), "10: log-probability"
            if len(expected.tokens) > request.sampling.min_tokens and right in request.sampling.stop_token_ids:
                must_stop = True
        if output.finish is not None:
            expected.finish = output.finish
            del self.live[output.id]
            self._check_finish(expected, started_at)
        else:
            assert output.tokens, "6: an output without content"
            assert not must_stop, "6: a stop token did not stop"

    def _check_finish(self, expected: Expected, started_at: float) -> None:
        finish, request, tokens = expected.finish, expected.request, expected.tokens
        assert finish is not None
        if expected.end is not None:
            assert (finish.reason, finish.error) == (expected.end, expected.error)
        elif request.score:
            assert finish.reason == "length"
            assert expected.num_scored == len(request.prompt) - 1, "6: scores are missing"
        elif finish.reason == "stop":
            assert finish.stop_token_id == tokens[-1]
            assert tokens[-1] in request.sampling.stop_token_ids
            assert len(tokens) > request.sampling.min_tokens
        else:
            assert (finish.reason, len(tokens)) == ("length", expected.max_tokens)
        assert finish.num_prompt_tokens == len(request.prompt)
        assert finish.num_output_tokens == len(tokens)
        assert finish.num_cached_tokens < len(request.prompt)
        seconds = finish.queue_seconds + finish.prefill_seconds + finish.decode_seconds
        assert seconds <= started_at - expected.submitted_at + 1e-9

    def _check_step(self, started_at: float, doomed: set[int]) -> None:
        config, scheduler, planned = self.config, self.scheduler, {item.seq.id for item in self.engine.planned}
        assert not doomed & self.live.keys(), "5: cancelled or expired, and not ended by the next step"
        assert not any(expected.end for expected in self.live.values()), "5: failed, and not ended in the same step"
        assert sum(item.num_tokens for item in self.engine.planned) <= config.max_num_batched_tokens, "7: token budget"
        assert sum(item.num_logits for item in self.engine.planned) <= config.max_logit_rows, "7: rows of logits"
        assert len(planned) <= config.max_num_seqs, "7: max_num_seqs"
        assert not doomed & planned, "8: a cancelled or expired sequence was scheduled"
        assert not self.held & planned, "8: a parked sequence, or one without credit, was scheduled"
        for item in self.engine.planned:
            assert item.num_tokens > 0, "9: scheduled for nothing"
        could_run = planned or any(expected.may_run for expected in self.live.values())
        assert bool(planned) == bool(could_run), "9: a step with work did none"
        for seq in scheduler.waiting:
            if seq.first_scheduled_at is None:
                assert not any(
                    item.seq.order > seq.order
                    and item.seq.first_scheduled_at == started_at
                    and item.seq.deadline is None
                    and (item.seq.tenant, item.seq.priority) == (seq.tenant, seq.priority)
                    for item in self.engine.planned
                ), "9: a later sequence was started first"
        assert scheduler.live.keys() == self.live.keys(), "14: the engine and the test disagree on who is live"
        self.engine.check_integrity()  # 1, 2, 3, 4, 13

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.log.disabled = False
        for number, expected in self.live.items():
            self.engine.unpark(number)
            self.engine.grant(number, 10_000)
            expected.is_parked, expected.credit = False, 10_000
        bound = 20 + 4 * sum(len(e.request.prompt) + e.max_tokens for e in self.live.values())
        while self.engine.has_work():
            self.run_step()
            bound -= 1
            assert bound > 0, "9: the engine does not come to an end"
        assert all(expected.finish is not None for expected in self.seqs.values()), "6: a sequence was never answered"
        blocks, scheduler = self.scheduler.blocks, self.scheduler
        assert blocks.num_free == self.config.num_blocks - 1, "14: blocks are not free at the end"
        for name in ("live", "waiting", "running", "parked", "idle_holders", "outputs"):
            assert not getattr(scheduler, name), f"14: {name} is not empty at the end"
        assert not blocks.pending, "14: blocks are pending at the end"
        assert len(scheduler.host.free) == self.config.num_host_blocks, "16: host blocks are not free at the end"
