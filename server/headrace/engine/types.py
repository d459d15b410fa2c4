"""What goes into the engine and what comes out: a closed msgspec schema, in process and as frames between processes.

The front end (`headrace.server`) makes these; the engine knows nothing of protobuf. Ids are made by the server, never
taken from a caller. Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

INTERACTIVE, STANDARD, BATCH = 0, 1, 2  # classes of priority, the most urgent first

FinishReason = Literal["stop", "length", "cancelled", "expired", "error"]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Validated parameters of one sequence; ranges and meaning as in protos/headrace/v1/inference.proto.

    Stop strings are the front end's business (it has the text) and do not appear here.
    """

    max_tokens: int
    seed: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()  # the model's end tokens included, unless ignore_eos
    num_logprobs: int = -1  # -1: none


class TimelineEvent(msgspec.Struct, frozen=True, array_like=True):
    """What happened to a traced sequence, and when. `until`, `num_tokens` and `step` are set for "prefill" only."""

    kind: Literal["prefill", "preempted", "parked", "resumed"]
    at: float
    until: float = 0.0
    num_tokens: int = 0
    step: int = 0


class StepRecord(msgspec.Struct, frozen=True, array_like=True):
    """A step that was run: its number from 1, when it was decided and done, and what was in it."""

    number: int
    started: float
    ended: float
    num_tokens: int
    num_sequences: int
    traced: tuple[int, ...] = ()  # ids of the traced sequences in it


class SequenceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One sequence to run.

    With `score`, nothing is generated: the outputs are one TokenOutput per prompt token from the second on, over one or
    several steps, then a finish with reason "length" and no output tokens.
    """

    id: int
    prompt: list[int]
    sampling: SamplingParams
    salt: str = ""  # tenant and cache salt: prefix-cache entries are shared only inside one salt
    deadline: float | None = None
    score: bool = False
    arrival: float = 0.0
    priority: int = STANDARD
    tenant: str = ""  # whose share of the engine it uses
    is_traced: bool = False  # its FinishOutput tells its timeline
    credit: int = -1  # output tokens until `Engine.grant`; -1: no limit
    conversation: int = 0  # key under which its KV stays cached after its end; 0: none
    lease: float = 0.0  # for so many seconds
    held: list[int] = []  # output tokens that were generated elsewhere: it goes on after them


class TokenOutput(msgspec.Struct, frozen=True):
    """One new token (or, scoring, one token of the prompt)."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class FinishOutput(msgspec.Struct, frozen=True):
    """How a sequence ended. Exactly one per accepted sequence."""

    reason: FinishReason
    stop_token_id: int | None = None
    error: str | None = None  # a stable reason, for "error" only
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    timeline: tuple[TimelineEvent, ...] = ()


class SequenceOutput(msgspec.Struct, frozen=True):
    """What one step did for one sequence."""

    id: int
    tokens: list[TokenOutput] = []
    finish: FinishOutput | None = None


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot after a step."""

    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_total_blocks: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0  # tokens looked up
    num_prefix_hits: int = 0  # tokens found
    num_parked: int = 0
    num_step_failures: int = 0  # steps in which the executor raised
    step_seconds: float = 0.0  # running estimates (`headrace.engine.estimates`): of a step without any tokens,
    step_token_seconds: float = 0.0  # of one more token in it,
    token_seconds: float = 0.0  # of what a stream waits for its next token,
    residence_seconds: float = 0.0  # of the time from a sequence's first step to its end,
    output_share: float = 0.0  # of how much of max_tokens is generated,
    cached_share: float = 0.0  # of how much of a prompt the prefix cache holds
    num_swapped_out: int = 0  # preemptions that kept their KV in host memory
    num_host_blocks: int = 0
    num_free_host_blocks: int = 0
    num_pinned_blocks: int = 0  # of the free blocks, those that hold what conversations may come back to
    num_cached_blocks: int = 0  # of the free blocks, those that only the prefix cache knows
    num_pins_lost: int = 0  # conversations whose blocks were needed before their lease ended
