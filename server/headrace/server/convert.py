"""Between protobuf and the engine's types: the one module that knows both. Its inputs are validated already."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headrace.engine import types
from headrace.models.load import ModelInfo
from headrace.server import wire
from headrace.server.admission import Claim
from headrace.server.errors import ServerError
from headrace.server.generation import Chunk, Ending
from headrace.server.origin import Origin, Receipt
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import models_pb2

_FINISH_REASONS = {
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "cancelled": pb.FINISH_REASON_CANCELLED,
    "interrupted": pb.FINISH_REASON_INTERRUPTED,
}
MODEL_STATES = {
    "loading": models_pb2.MODEL_STATE_LOADING,
    "ready": models_pb2.MODEL_STATE_READY,
    "failed": models_pb2.MODEL_STATE_FAILED,
    "draining": models_pb2.MODEL_STATE_DRAINING,
}
_SEED_BITS = 64
_PRIORITIES: dict[int, int] = {
    pb.PRIORITY_UNSPECIFIED: types.STANDARD,
    pb.PRIORITY_INTERACTIVE: types.INTERACTIVE,
    pb.PRIORITY_STANDARD: types.STANDARD,
    pb.PRIORITY_BATCH: types.BATCH,
}


@dataclass(frozen=True)
class Common:
    """What the sequences of one request share, besides their sampling parameters."""

    prompt: list[int]
    salt: str
    deadline: float  # CLOCK_MONOTONIC seconds
    arrival: float
    claim: Claim
    conversation: int = 0  # as in types.SequenceRequest, as are the two below
    lease: float = 0.0
    credit: int = -1


def sampling(
    params: pb.SamplingParams, *, max_tokens: int, seed: int, end_tokens: Sequence[int]
) -> types.SamplingParams:
    """The engine's parameters. max_tokens: the number in force; end_tokens: the model's."""
    return types.SamplingParams(
        max_tokens=max_tokens,
        seed=seed,
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        top_k=params.top_k,
        top_p=params.top_p if params.HasField("top_p") else 1.0,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty if params.HasField("repetition_penalty") else 1.0,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias),
        min_tokens=params.min_tokens,
        stop_token_ids=stop_tokens(params, end_tokens),
        num_logprobs=params.logprobs if params.HasField("logprobs") else -1,
    )


def claim(priority: int, tenant: str, deadline: float) -> Claim:
    """Who asks, and how urgently. priority: pb.Priority."""
    return Claim(tenant, _PRIORITIES[priority], deadline)


def stop_tokens(params: pb.SamplingParams | pb.StopConditions, end_tokens: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end a generation, the model's own unless they are to be ignored."""
    token_ids = dict.fromkeys(params.stop_token_ids)
    if not params.ignore_eos:
        token_ids.update(dict.fromkeys(end_tokens))
    return tuple(token_ids)


def seeds(params: pb.SamplingParams) -> list[int]:
    """One seed per generation. The first is the request's own (or drawn), the i-th is derived from it and i, so that
    asking for more generations never changes the first ones."""
    seed = params.seed if params.HasField("seed") else secrets.randbits(_SEED_BITS)
    return [seed, *(_derived_seed(seed, index) for index in range(1, params.n or 1))]


def sequence(common: Common, params: types.SamplingParams, held: list[int], sequence_id: int) -> types.SequenceRequest:
    """A sequence that generates. held: output tokens that there are already."""
    return types.SequenceRequest(
        id=sequence_id,
        prompt=common.prompt,
        sampling=params,
        salt=common.salt,
        deadline=common.deadline,
        arrival=common.arrival,
        priority=common.claim.priority,
        tenant=common.claim.tenant,
        held=held,
        conversation=common.conversation,
        lease=common.lease,
        credit=common.credit,
    )


def score_sequence(common: Common, num_logprobs: int, sequence_id: int) -> types.SequenceRequest:
    """A sequence whose prompt is scored."""
    return types.SequenceRequest(
        id=sequence_id,
        prompt=common.prompt,
        sampling=types.SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=num_logprobs),
        salt=common.salt,
        deadline=common.deadline,
        arrival=common.arrival,
        priority=common.claim.priority,
        tenant=common.claim.tenant,
        score=True,
    )


def chunk(index: int, news: Chunk) -> pb.GenerationChunk:
    """One message's worth of a generation."""
    return pb.GenerationChunk(
        index=index,
        offset=news.offset,
        token_ids=[token.token_id for token in news.tokens],
        text=news.text,
        logprobs=logprobs(news.tokens),
        finish=finish(news.ending) if news.ending is not None else None,
        generation_id=news.generation_id,
        origin=origin(news.origin) if news.origin is not None else None,
    )


def origin(made_from: Origin) -> pb.Origin:
    """From what a generation is made."""
    return pb.Origin(
        prompt_hash=made_from.prompt_hash,
        model_digest=made_from.model_digest,
        tokenizer_digest=made_from.tokenizer_digest,
        arithmetic=made_from.arithmetic,
        seed=made_from.seed,
        max_tokens=made_from.max_tokens,
    )


def receipt(proof: Receipt) -> pb.Receipt:
    """How a generation can be made again."""
    params = pb.SamplingParams()
    params.CopyFrom(proof.origin.sampling)
    params.seed, params.max_tokens, params.n = proof.origin.seed, proof.origin.max_tokens, 1
    return pb.Receipt(
        origin=origin(proof.origin),
        sampling=params,
        token_hash=proof.token_hash,
        generated_tokens=proof.num_tokens,
        model=proof.origin.model,
        server_version=proof.origin.server_version,
    )


def generate_response(index: int, news: Chunk) -> bytes:
    """`chunk` in a GenerateResponse, serialised; the usual message, a token and its text, the quick way."""
    tokens = news.tokens
    if news.ending is not None or news.origin is not None or not tokens or tokens[0].logprob is not None:
        return pb.GenerateResponse(chunk=chunk(index, news)).SerializeToString()
    ids = [token.token_id for token in tokens]
    return wire.generate_response(index, news.offset, ids, news.text, news.generation_id)


def logprobs(tokens: Iterable[types.TokenOutput]) -> list[pb.TokenLogprob]:
    """One entry per token that has a log-probability."""
    return [
        pb.TokenLogprob(
            token_id=token.token_id,
            logprob=token.logprob,
            alternatives=[pb.TokenAlternative(token_id=token_id, logprob=value) for token_id, value in token.top],
        )
        for token in tokens
        if token.logprob is not None
    ]


def finish(ending: Ending) -> pb.Finish:
    """The end of a generation."""
    return pb.Finish(
        reason=_FINISH_REASONS[ending.reason],
        stop_string=ending.stop_string,
        stop_token_id=ending.stop_token_id,
        usage=pb.Usage(
            prompt_tokens=ending.num_prompt_tokens,
            cached_prompt_tokens=ending.num_cached_tokens,
            generated_tokens=ending.num_generated_tokens,
        ),
        timing=pb.Timing(
            queue_seconds=ending.queue_seconds,
            prefill_seconds=ending.prefill_seconds,
            decode_seconds=ending.decode_seconds,
        ),
        seed=ending.seed,
        receipt=receipt(ending.receipt) if ending.receipt is not None else None,
    )


def score_response(
    token_ids: Sequence[int], scored: Iterable[types.TokenOutput], end: types.FinishOutput
) -> pb.ScoreResponse:
    """A scored text."""
    return pb.ScoreResponse(
        token_ids=token_ids,
        logprobs=logprobs(scored),
        usage=pb.Usage(prompt_tokens=end.num_prompt_tokens, cached_prompt_tokens=end.num_cached_tokens),
        timing=pb.Timing(
            queue_seconds=end.queue_seconds,
            prefill_seconds=end.prefill_seconds,
            decode_seconds=end.decode_seconds,
        ),
    )


def session_error(generation_id: str, error: ServerError, *, is_final: bool) -> pb.SessionResponse:
    """A failure as an event of a session. is_final: the generation does not run, or runs no longer."""
    return pb.SessionResponse(
        error=pb.SessionError(
            generation_id=generation_id,
            code=error.kind.code.value[0],
            reason=error.kind.reason,
            message=error.message,
            field=error.violations[0].field if error.violations else "",
            retry_after_seconds=error.retry_after or 0.0,
            is_final=is_final,
        )
    )


def model(
    name: str, state: str, progress: float, info: ModelInfo | None, context_length: int, backend: str
) -> models_pb2.Model:
    """A model's description. info: None while it loads."""
    described = models_pb2.Model(name=name, state=MODEL_STATES[state], load_progress=progress)
    if info is not None:
        described.architecture = info.architecture
        described.parameters = info.parameters
        described.quantization = info.quantization
        described.context_length = context_length
        described.vocab_size = info.vocab_size
        described.chat_template = info.chat_template
        described.eos_token_ids.extend(info.eos_token_ids)
        described.backend = backend
        described.file_bytes = info.file_bytes
    return described


def _derived_seed(seed: int, index: int) -> int:
    """SplitMix64 (Steele, Lea, Flood 2014) of the seed moved on by `index` of its steps."""
    mask = (1 << _SEED_BITS) - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
