"""The one validator: every field of every request at its limits, before anything is allocated or computed for it.

Called by every entry point with the parsed message; raises InvalidRequestError with ALL faults of the request. Limits
are those of the comments in protos/headrace/v1/inference.proto. What depends on the tokenised prompt (does it fit into
the context?) is checked by `check_length` afterwards.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from headrace.server import errors
from headrace.server.errors import InvalidRequestError, ServerError, Violation
from headrace.v1 import inference_pb2 as pb

MAX_MESSAGES = 1024
MAX_LABEL_BYTES = 128
MAX_ID_BYTES = 128
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_STOP_TOKENS = 64
MAX_CREDIT = 0xFFFF_FFFF
MAX_BIASES = 1024
MAX_LOGPROBS = 20
MAX_N = 16
MAX_DETOKENIZE_TOKENS = 1 << 20
MAX_ARITHMETIC_BYTES = 256
DEFAULT_MAX_TOKENS = 256
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PRIORITIES = frozenset(pb.Priority.values())
_ROLES = frozenset(pb.Role.values()) - {pb.ROLE_UNSPECIFIED}


class Named(Protocol):
    """A command about a generation."""

    @property
    def generation_id(self) -> str: ...


@dataclass(frozen=True)
class Limits:
    """What the model allows, in tokens."""

    context_length: int
    vocab_size: int


class _Faults:
    """Collects violations under a path."""

    def __init__(self) -> None:
        self.found: list[Violation] = []

    def add(self, field: str, reason: str, description: str) -> None:
        self.found.append(Violation(field, description, reason))

    def check_range(self, field: str, value: float, least: float, most: float, *, is_open: bool = False) -> None:
        """least <= value <= most, or least < value where is_open; finite."""
        if not math.isfinite(value):
            self.add(field, "NOT_FINITE", "must be a finite number")
        elif not least <= value <= most or (is_open and value == least):
            self.add(field, "OUT_OF_RANGE", f"must be in {'(' if is_open else '['}{least:.10g}, {most:.10g}]")

    def check_bytes(self, field: str, value: str, most: int) -> None:
        if len(value.encode()) > most:
            self.add(field, "TOO_LONG", f"must be at most {most} bytes")

    def check_id(self, field: str, value: str) -> None:
        if not value:
            self.add(field, "REQUIRED", "must not be empty")
        self.check_bytes(field, value, MAX_ID_BYTES)

    def check_token_ids(self, field: str, ids: Sequence[int], vocab_size: int) -> None:
        """Reports the first id outside the vocabulary."""
        if max(ids, default=0) >= vocab_size:  # the quick way for the long lists, which are right
            index = next(index for index, token_id in enumerate(ids) if token_id >= vocab_size)
            self.add(f"{field}[{index}]", "OUT_OF_RANGE", f"must be below the vocabulary's size, {vocab_size}")

    def raise_any(self) -> None:
        if self.found:
            raise InvalidRequestError(self.found)


def generate(request: pb.GenerateRequest, limits: Limits, path: str = "") -> None:
    """GenerateRequest; path: where it sits in its parent, e.g. "request."."""
    faults = _Faults()
    _generate(faults, request, limits, path)
    faults.raise_any()


def complete(request: pb.CompleteRequest, limits: Limits) -> None:
    """CompleteRequest."""
    faults = _Faults()
    if not request.HasField("request"):
        faults.add("request", "REQUIRED", "must be set")
    else:
        _not_resumed(faults, request.request, "request.")
        _generate(faults, request.request, limits, "request.")
    faults.raise_any()


def resume(request: pb.ResumeRequest | pb.CancelRequest) -> None:
    """ResumeRequest and CancelRequest."""
    faults = _Faults()
    faults.check_id("generation_id", request.generation_id)
    faults.raise_any()


def session_start(command: pb.SessionStart, limits: Limits) -> None:
    """SessionStart."""
    faults = _Faults()
    faults.check_id("start.generation_id", command.generation_id)
    faults.check_bytes("start.conversation_id", command.conversation_id, MAX_ID_BYTES)
    if not command.HasField("request"):
        faults.add("start.request", "REQUIRED", "must be set")
    else:
        _not_resumed(faults, command.request, "start.request.")
        _generate(faults, command.request, limits, "start.request.")
        if command.request.sampling.n > 1:
            faults.add("start.request.sampling.n", "OUT_OF_RANGE", "must be 1 in a session")
        if command.conversation_id and command.request.prompt.WhichOneof("form") not in (None, "chat"):
            faults.add("start.request.prompt", "CONFLICT", "must be chat messages where a conversation is kept")
    faults.raise_any()


def session_append(command: pb.SessionAppend, limits: Limits) -> None:
    """SessionAppend."""
    faults = _Faults()
    faults.check_id("append.generation_id", command.generation_id)
    faults.check_id("append.conversation_id", command.conversation_id)
    _messages(faults, command.messages, "append.messages")
    _sampling(faults, command.sampling, limits, "append.sampling.")
    if command.sampling.n > 1:
        faults.add("append.sampling.n", "OUT_OF_RANGE", "must be 1 in a session")
    faults.raise_any()


def session_target(command: Named, name: str) -> None:
    """What all commands about a running generation have in common. name: of the command in SessionRequest."""
    faults = _Faults()
    faults.check_id(f"{name}.generation_id", command.generation_id)
    faults.raise_any()


def session_interrupt(command: pb.SessionInterrupt, num_sent: int) -> None:
    """SessionInterrupt of a generation that has sent so many tokens."""
    faults = _Faults()
    faults.check_range("interrupt.heard_tokens", command.heard_tokens, 0, num_sent)
    faults.raise_any()


def session_credit(command: pb.SessionCredit, num_granted: int) -> None:
    """SessionCredit for a generation that was granted so many tokens before."""
    faults = _Faults()
    if not command.tokens:
        faults.add("credit.tokens", "OUT_OF_RANGE", "must be at least 1")
    elif num_granted + command.tokens > MAX_CREDIT:
        faults.add("credit.tokens", "OUT_OF_RANGE", f"must be at most {MAX_CREDIT - num_granted} more")
    faults.raise_any()


def session_update(command: pb.SessionUpdate, limits: Limits) -> None:
    """SessionUpdate."""
    faults = _Faults()
    faults.check_id("update.generation_id", command.generation_id)
    if command.HasField("max_tokens"):
        faults.check_range("update.max_tokens", command.max_tokens, 1, limits.context_length - 1)
    elif not command.HasField("stop_conditions"):
        faults.add("update.max_tokens", "REQUIRED", "must be set, or stop_conditions")
    _stops(faults, command.stop_conditions, limits, "update.stop_conditions.")
    faults.raise_any()


def tokenize(request: pb.TokenizeRequest, limits: Limits) -> None:
    """TokenizeRequest."""
    faults = _Faults()
    if request.prompt.WhichOneof("form") == "tokens":
        faults.add("prompt.tokens", "CONFLICT", "must be text or chat messages")
    else:
        _prompt(faults, request.prompt, limits, "prompt")
    faults.raise_any()


def detokenize(request: pb.DetokenizeRequest, limits: Limits) -> None:
    """DetokenizeRequest."""
    faults = _Faults()
    if not request.token_ids:
        faults.add("token_ids", "REQUIRED", "must not be empty")
    elif len(request.token_ids) > MAX_DETOKENIZE_TOKENS:
        faults.add("token_ids", "TOO_MANY", f"must be at most {MAX_DETOKENIZE_TOKENS}")
    else:
        faults.check_token_ids("token_ids", request.token_ids, limits.vocab_size)
    faults.raise_any()


def score(request: pb.ScoreRequest, limits: Limits) -> None:
    """ScoreRequest."""
    faults = _Faults()
    _prompt(faults, request.prompt, limits, "prompt")
    faults.check_range("top_logprobs", request.top_logprobs, 0, MAX_LOGPROBS)
    _label(faults, request.request_label, "request_label")
    faults.raise_any()


def check_length(num_prompt: int, sampling: pb.SamplingParams, limits: Limits, path: str = "") -> int:
    """The max_tokens in force for a prompt of so many tokens. Raises PROMPT_TOO_LONG or an empty prompt's fault."""
    if num_prompt == 0:
        raise InvalidRequestError([Violation(f"{path}prompt", "must not be empty", "REQUIRED")])
    room = limits.context_length - num_prompt
    if room < 1:
        description = f"has {num_prompt} tokens; the context of {limits.context_length} must hold one more"
        raise InvalidRequestError([Violation(f"{path}prompt", description, "TOO_LONG")], errors.PROMPT_TOO_LONG)
    if sampling.max_tokens > room:
        description = f"must be at most {room} after a prompt of {num_prompt} tokens"
        violation = Violation(f"{path}sampling.max_tokens", description, "OUT_OF_RANGE")
        raise InvalidRequestError([violation], errors.PROMPT_TOO_LONG)
    max_tokens = sampling.max_tokens or min(DEFAULT_MAX_TOKENS, room)
    if sampling.min_tokens > max_tokens:
        violation = Violation(f"{path}sampling.min_tokens", f"must be at most {max_tokens}", "OUT_OF_RANGE")
        raise InvalidRequestError([violation])
    return max_tokens


def check_score_length(num_tokens: int, limits: Limits) -> None:
    """A text to score has 2 tokens at least and fits into the context."""
    if num_tokens < 2:
        raise InvalidRequestError([Violation("prompt", "must have at least 2 tokens", "OUT_OF_RANGE")])
    if num_tokens > limits.context_length:
        description = f"has {num_tokens} tokens; the context holds {limits.context_length}"
        raise InvalidRequestError([Violation("prompt", description, "TOO_LONG")], errors.PROMPT_TOO_LONG)


def check_model(name: str, served: str) -> None:
    """The empty name is the only model's. Raises MODEL_NOT_FOUND."""
    if name and name != served:
        raise ServerError(errors.MODEL_NOT_FOUND)


def _generate(faults: _Faults, request: pb.GenerateRequest, limits: Limits, path: str) -> None:
    _prompt(faults, request.prompt, limits, f"{path}prompt")
    _sampling(faults, request.sampling, limits, f"{path}sampling.")
    _label(faults, request.request_label, f"{path}request_label")
    faults.check_bytes(f"{path}cache_salt", request.cache_salt, MAX_LABEL_BYTES)
    if request.priority not in _PRIORITIES:
        faults.add(f"{path}priority", "OUT_OF_RANGE", "must be a Priority")
    _continuation(faults, request, limits, path)


def _continuation(faults: _Faults, request: pb.GenerateRequest, limits: Limits, path: str) -> None:
    if (request.resumable or request.HasField("continuation")) and request.sampling.n > 1:
        faults.add(f"{path}sampling.n", "CONFLICT", "must be 1 where a generation is resumable or continued")
    if not request.HasField("continuation"):
        return
    held, path = request.continuation, f"{path}continuation."
    if len(held.token_ids) > limits.context_length:
        faults.add(f"{path}token_ids", "TOO_MANY", f"must be at most {limits.context_length}")
    else:
        faults.check_token_ids(f"{path}token_ids", held.token_ids, limits.vocab_size)
    for field, value in (("prompt_hash", held.prompt_hash), ("model_digest", held.model_digest)):
        if not _DIGEST.fullmatch(value):
            faults.add(f"{path}{field}", "BAD_CHARACTER", "must be 64 lower-case hexadecimal digits")
    faults.check_bytes(f"{path}arithmetic", held.arithmetic, MAX_ARITHMETIC_BYTES)
    if held.token_ids and not request.sampling.HasField("seed"):
        faults.add(f"{path.removesuffix('continuation.')}sampling.seed", "REQUIRED", "must be set to go on")


def _not_resumed(faults: _Faults, request: pb.GenerateRequest, path: str) -> None:
    """What Generate alone can do."""
    if request.resumable:
        faults.add(f"{path}resumable", "CONFLICT", "can be set in Generate only")
    if request.HasField("continuation"):
        faults.add(f"{path}continuation", "CONFLICT", "can be set in Generate only")


def _label(faults: _Faults, label: str, field: str) -> None:
    faults.check_bytes(field, label, MAX_LABEL_BYTES)
    if not (label.isascii() and (label.isprintable() or not label)):
        faults.add(field, "BAD_CHARACTER", "must be printable ASCII")


def _prompt(faults: _Faults, prompt: pb.Prompt, limits: Limits, field: str) -> None:
    form = prompt.WhichOneof("form")
    if form is None:
        faults.add(field, "REQUIRED", "must be text, chat messages or token ids")
    elif form == "text":
        if not prompt.text:
            faults.add(f"{field}.text", "REQUIRED", "must not be empty")
    elif form == "chat":
        _messages(faults, prompt.chat.messages, f"{field}.chat.messages")
    else:
        ids = prompt.tokens.ids
        if not ids:
            faults.add(f"{field}.tokens.ids", "REQUIRED", "must not be empty")
        elif len(ids) > limits.context_length:
            faults.add(f"{field}.tokens.ids", "TOO_MANY", f"must be at most {limits.context_length}")
        else:
            faults.check_token_ids(f"{field}.tokens.ids", ids, limits.vocab_size)


def _messages(faults: _Faults, messages: Iterable[pb.ChatMessage], field: str) -> None:
    count = 0
    for count, message in enumerate(messages, 1):
        if count > MAX_MESSAGES:
            faults.add(field, "TOO_MANY", f"must be at most {MAX_MESSAGES}")
            return
        if message.role not in _ROLES:
            faults.add(f"{field}[{count - 1}].role", "OUT_OF_RANGE", "must be one of the roles")
    if not count:
        faults.add(field, "REQUIRED", "must not be empty")


def _sampling(faults: _Faults, sampling: pb.SamplingParams, limits: Limits, path: str) -> None:
    check = faults.check_range
    check(f"{path}temperature", sampling.temperature, 0, 100)
    check(f"{path}top_k", sampling.top_k, 0, limits.vocab_size)
    if sampling.HasField("top_p"):
        check(f"{path}top_p", sampling.top_p, 0, 1, is_open=True)
    check(f"{path}min_p", sampling.min_p, 0, 1)
    if sampling.HasField("repetition_penalty"):
        check(f"{path}repetition_penalty", sampling.repetition_penalty, 0, 10, is_open=True)
    check(f"{path}presence_penalty", sampling.presence_penalty, -2, 2)
    check(f"{path}frequency_penalty", sampling.frequency_penalty, -2, 2)
    check(f"{path}max_tokens", sampling.max_tokens, 0, limits.context_length - 1)
    check(f"{path}min_tokens", sampling.min_tokens, 0, sampling.max_tokens or DEFAULT_MAX_TOKENS)
    check(f"{path}logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    check(f"{path}n", sampling.n, 0, MAX_N)
    _stops(faults, sampling, limits, path)
    if len(sampling.logit_bias) > MAX_BIASES:
        faults.add(f"{path}logit_bias", "TOO_MANY", f"must have at most {MAX_BIASES} entries")
        return
    for token_id, bias in sorted(sampling.logit_bias.items()):
        if token_id >= limits.vocab_size:
            faults.add(f"{path}logit_bias[{token_id}]", "OUT_OF_RANGE", "must be a token id of the vocabulary")
        check(f"{path}logit_bias[{token_id}]", bias, -100, 100)


def _stops(faults: _Faults, sampling: pb.SamplingParams | pb.StopConditions, limits: Limits, path: str) -> None:
    if len(sampling.stop) > MAX_STOPS:
        faults.add(f"{path}stop", "TOO_MANY", f"must be at most {MAX_STOPS}")
    else:
        for index, stop in enumerate(sampling.stop):
            if not stop:
                faults.add(f"{path}stop[{index}]", "REQUIRED", "must not be empty")
            faults.check_bytes(f"{path}stop[{index}]", stop, MAX_STOP_BYTES)
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        faults.add(f"{path}stop_token_ids", "TOO_MANY", f"must be at most {MAX_STOP_TOKENS}")
    else:
        faults.check_token_ids(f"{path}stop_token_ids", sampling.stop_token_ids, limits.vocab_size)
