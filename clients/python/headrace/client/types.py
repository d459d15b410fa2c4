"""The plain values that the client takes and gives: users of `headrace.client` never touch protobuf.

Ranges, units and defaults are those of protos/headrace/v1/inference.proto; the server checks them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "cancelled", "error", "interrupted"]
Priority = Literal["interactive", "standard", "batch"]  # its class when the server has more than it can do
ModelState = Literal["loading", "ready", "failed", "draining"]


class Sampling(TypedDict, total=False):
    """Keyword arguments of every generating call. What is absent takes the server's default."""

    temperature: float  # [0, 100]; 0 is greedy
    top_k: int  # 0 keeps all
    top_p: float  # (0, 1]
    min_p: float  # [0, 1]
    repetition_penalty: float  # (0, 10]
    presence_penalty: float  # [-2, 2]
    frequency_penalty: float  # [-2, 2]
    logit_bias: Mapping[int, float]  # token id to addend in [-100, 100]
    seed: int  # the same seed, prompt and parameters give the same tokens
    max_tokens: int  # at least 1
    min_tokens: int
    stop: Sequence[str]  # the text ends before the first of these
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int  # alternatives per token, 0 to 20
    n: int  # generations of the same prompt, 1 to 16
    include_stop: bool


class StopConditions(TypedDict, total=False):
    """When a generation stops, of those of Sampling; what is absent is empty or False."""

    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


# What a call accepts as a conversation: Message objects, or mappings with the keys "role" and "content".
Messages = Sequence["Message | Mapping[str, str]"]


@dataclass(frozen=True)
class TokenAlternative:
    """A token that the model could have chosen; `logprob` is a natural logarithm."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprob:
    """A token, the natural logarithm of its probability, and the most likely tokens in its place."""

    token_id: int
    logprob: float
    alternatives: tuple[TokenAlternative, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one generation."""

    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True)
class Timing:
    """Seconds of one generation: waiting, up to the first token, from the first to the last token."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class Receipt:
    """How a generation can be made again and checked (`headrace replay`). Hashes are SHA-256, hexadecimal; those of
    tokens are over 4 bytes an id, little-endian. `sampling` holds the parameters in force, seed and max_tokens too."""

    model: str
    model_digest: str
    tokenizer_digest: str
    arithmetic: str  # back end, version and precision: what else decides the bits of the logits
    server_version: str
    prompt_hash: str
    sampling: Sampling
    token_hash: str
    generated_tokens: int


@dataclass(frozen=True)
class Finish:
    """How a generation ended. `stop_string` is empty and `stop_token_id` None where none matched. `receipt` is None
    where a session changed the generation while it ran."""

    reason: FinishReason
    stop_string: str
    stop_token_id: int | None
    usage: Usage
    timing: Timing
    seed: int
    receipt: Receipt | None = None


@dataclass(frozen=True)
class Chunk:
    """What one generation produced in one engine step; `finish` is set in its last chunk only. `generation_id` is the
    server's own; where the client resumed, a later one may differ from the first."""

    index: int
    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    generation_id: str = ""


@dataclass(frozen=True)
class Completion:
    """One whole generation."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish


@dataclass(frozen=True)
class Tokens:
    """The ids that a prompt becomes, and the text they were made from (after the chat template)."""

    token_ids: tuple[int, ...]
    rendered: str


@dataclass(frozen=True)
class Scores:
    """The tokens of a text, and one entry per token from the second on: how likely it was after those before it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    usage: Usage
    timing: Timing


@dataclass(frozen=True)
class ModelInfo:
    """One model of a server. While it loads, only `name`, `state` and `load_progress` are set."""

    name: str
    state: ModelState
    load_progress: float
    architecture: str
    parameters: int
    quantization: str
    context_length: int
    vocab_size: int
    chat_template: str
    eos_token_ids: tuple[int, ...]
    backend: str
    file_bytes: int


@dataclass(frozen=True)
class Pong:
    """The answer to a ping: seconds to the engine and back, and the steps that the engine has done."""

    seconds: float
    engine_steps: int
