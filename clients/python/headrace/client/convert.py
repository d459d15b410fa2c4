"""Plain values to messages of headrace.v1 and back; shared by the sync and the asyncio client, free of I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from headrace.client import types
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import models_pb2

_ROLES: dict[str, pb.Role.ValueType] = {
    "system": pb.ROLE_SYSTEM,
    "user": pb.ROLE_USER,
    "assistant": pb.ROLE_ASSISTANT,
    "tool": pb.ROLE_TOOL,
}
_REASONS: dict[int, types.FinishReason] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
    pb.FINISH_REASON_CANCELLED: "cancelled",
    pb.FINISH_REASON_ERROR: "error",
    pb.FINISH_REASON_INTERRUPTED: "interrupted",
}
_STATES: dict[int, types.ModelState] = {
    models_pb2.MODEL_STATE_LOADING: "loading",
    models_pb2.MODEL_STATE_READY: "ready",
    models_pb2.MODEL_STATE_FAILED: "failed",
    models_pb2.MODEL_STATE_DRAINING: "draining",
}
_PRIORITIES = {
    "interactive": pb.PRIORITY_INTERACTIVE,
    "standard": pb.PRIORITY_STANDARD,
    "batch": pb.PRIORITY_BATCH,
}
_SAMPLING_FIELDS = frozenset(types.Sampling.__optional_keys__)


def make_messages(messages: types.Messages) -> list[pb.ChatMessage]:
    """Chat messages; a role that is none, or a mapping with other keys, is a ValueError."""
    result = []
    for message in messages:
        if isinstance(message, Mapping):
            if set(message) != {"role", "content"}:
                raise ValueError(f"a message has the keys 'role' and 'content', not {sorted(message)}")
            role, content = message["role"], message["content"]
        else:
            role, content = message.role, message.content
        if role not in _ROLES:
            raise ValueError(f"unknown role {role!r}: use one of {', '.join(_ROLES)}")
        result.append(pb.ChatMessage(role=_ROLES[role], content=content))
    return result


def make_prompt(text: str | None, messages: types.Messages | None, token_ids: Sequence[int] | None) -> pb.Prompt:
    """The prompt in the one form that is given; none or several is a TypeError."""
    if sum(form is not None for form in (text, messages, token_ids)) != 1:
        raise TypeError("give exactly one of prompt, messages and token_ids")
    if text is not None:
        return pb.Prompt(text=text)
    if messages is not None:
        return pb.Prompt(chat=pb.ChatPrompt(messages=make_messages(messages)))
    return pb.Prompt(tokens=pb.TokenIds(ids=token_ids))


def make_sampling(sampling: types.Sampling) -> pb.SamplingParams:
    """Sampling parameters; a name that is none is a TypeError, None counts as absent."""
    unknown = set(sampling) - _SAMPLING_FIELDS
    if unknown:
        raise TypeError(f"unknown sampling parameters: {', '.join(sorted(unknown))}")
    given = {name: value for name, value in sampling.items() if value is not None}
    return pb.SamplingParams(**given)  # type: ignore[arg-type]


def make_generate(
    prompt: pb.Prompt,
    sampling: types.Sampling,
    *,
    model: str,
    label: str,
    cache_salt: str,
    priority: types.Priority = "standard",
) -> pb.GenerateRequest:
    """A whole GenerateRequest. Raises TypeError where there is no such priority."""
    if priority not in _PRIORITIES:
        raise TypeError(f"priority must be one of {', '.join(_PRIORITIES)}")
    return pb.GenerateRequest(
        model=model,
        prompt=prompt,
        sampling=make_sampling(sampling),
        request_label=label,
        cache_salt=cache_salt,
        priority=_PRIORITIES[priority],
    )


def make_append(conversation: str, messages: str | types.Messages, sampling: types.Sampling) -> pb.SessionAppend:
    """An append command without its generation's name; a string is one turn of the user."""
    turns: types.Messages = [types.Message("user", messages)] if isinstance(messages, str) else messages
    return pb.SessionAppend(
        conversation_id=conversation,
        messages=make_messages(turns),
        sampling=make_sampling(sampling) if sampling else None,
    )


def make_update(
    generation_id: str, max_tokens: int | None, stop_conditions: types.StopConditions | None
) -> pb.SessionRequest:
    """An update command; without a change it is a TypeError."""
    if max_tokens is None and stop_conditions is None:
        raise TypeError("give max_tokens, stop_conditions or both")
    command = pb.SessionUpdate(generation_id=generation_id, max_tokens=max_tokens)
    if stop_conditions is not None:
        unknown = set(stop_conditions) - types.StopConditions.__optional_keys__
        if unknown:
            raise TypeError(f"unknown stop conditions: {', '.join(sorted(unknown))}")
        command.stop_conditions.CopyFrom(pb.StopConditions(**stop_conditions))
    return pb.SessionRequest(update=command)


def make_interrupt(generation_id: str, heard_tokens: int | None) -> pb.SessionRequest:
    """An interrupt command."""
    return pb.SessionRequest(interrupt=pb.SessionInterrupt(generation_id=generation_id, heard_tokens=heard_tokens))


def to_logprobs(entries: Iterable[pb.TokenLogprob]) -> tuple[types.TokenLogprob, ...]:
    """Log-probabilities, in order."""
    return tuple(
        types.TokenLogprob(
            entry.token_id,
            entry.logprob,
            tuple(types.TokenAlternative(other.token_id, other.logprob) for other in entry.alternatives),
        )
        for entry in entries
    )


def to_usage(usage: pb.Usage) -> types.Usage:
    """Token counts."""
    return types.Usage(usage.prompt_tokens, usage.cached_prompt_tokens, usage.generated_tokens)


def to_timing(timing: pb.Timing) -> types.Timing:
    """Times."""
    return types.Timing(timing.queue_seconds, timing.prefill_seconds, timing.decode_seconds)


def to_finish(finish: pb.Finish) -> types.Finish:
    """The end of a generation. A reason that this client does not know counts as "error"."""
    return types.Finish(
        reason=_REASONS.get(finish.reason, "error"),
        stop_string=finish.stop_string,
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
        usage=to_usage(finish.usage),
        timing=to_timing(finish.timing),
        seed=finish.seed,
        receipt=to_receipt(finish.receipt) if finish.HasField("receipt") else None,
    )


def to_receipt(receipt: pb.Receipt) -> types.Receipt:
    """A receipt. Only parameters that were set appear in its sampling."""
    sampling: dict[str, object] = {}
    for field, value in receipt.sampling.ListFields():
        if field.name == "logit_bias":
            sampling[field.name] = dict(value)
        else:
            sampling[field.name] = value if isinstance(value, (int, float)) else list(value)
    origin = receipt.origin
    return types.Receipt(
        model=receipt.model,
        model_digest=origin.model_digest,
        tokenizer_digest=origin.tokenizer_digest,
        arithmetic=origin.arithmetic,
        server_version=receipt.server_version,
        prompt_hash=origin.prompt_hash,
        sampling=cast(types.Sampling, sampling),
        token_hash=receipt.token_hash,
        generated_tokens=receipt.generated_tokens,
    )


def to_chunk(chunk: pb.GenerationChunk) -> types.Chunk:
    """One chunk."""
    return types.Chunk(
        index=chunk.index,
        offset=chunk.offset,
        token_ids=tuple(chunk.token_ids),
        text=chunk.text,
        logprobs=to_logprobs(chunk.logprobs),
        finish=to_finish(chunk.finish) if chunk.HasField("finish") else None,
        generation_id=chunk.generation_id,
    )


def to_completions(response: pb.CompleteResponse) -> list[types.Completion]:
    """All generations, by index."""
    return [
        types.Completion(c.index, tuple(c.token_ids), c.text, to_logprobs(c.logprobs), to_finish(c.finish))
        for c in response.completions
    ]


def to_tokens(response: pb.TokenizeResponse) -> types.Tokens:
    """The answer of Tokenize."""
    return types.Tokens(tuple(response.token_ids), response.rendered)


def to_scores(response: pb.ScoreResponse) -> types.Scores:
    """The answer of Score."""
    return types.Scores(
        tuple(response.token_ids), to_logprobs(response.logprobs), to_usage(response.usage), to_timing(response.timing)
    )


def to_model(model: models_pb2.Model) -> types.ModelInfo:
    """One model's description. A state that this client does not know counts as "failed"."""
    return types.ModelInfo(
        name=model.name,
        state=_STATES.get(model.state, "failed"),
        load_progress=model.load_progress,
        architecture=model.architecture,
        parameters=model.parameters,
        quantization=model.quantization,
        context_length=model.context_length,
        vocab_size=model.vocab_size,
        chat_template=model.chat_template,
        eos_token_ids=tuple(model.eos_token_ids),
        backend=model.backend,
        file_bytes=model.file_bytes,
    )
