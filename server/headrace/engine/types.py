"""What goes into the engine and what comes out: a closed msgspec schema, in process and as frames between processes.

The front end (`headrace.server`) makes these; the engine knows nothing of protobuf. Ids are made by the server, never
taken from a caller. Times are seconds of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

from typing import Literal

import msgspec

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
