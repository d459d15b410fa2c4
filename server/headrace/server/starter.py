"""From a tokenised prompt to running sequences: what Generate, Complete and Session have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import partial

from headrace.server import convert, validate
from headrace.server.admission import RequestGuard
from headrace.server.engine_client import Mailbox
from headrace.server.generation import Generation
from headrace.server.model_host import ModelHost
from headrace.server.origin import check_continuation, origins
from headrace.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Start:
    """What to run. deadline: CLOCK_MONOTONIC seconds. path: where the request sits in its message, for faults."""

    ids: list[int]
    sampling: pb.SamplingParams
    salt: str
    deadline: float
    path: str = ""
    continuation: pb.Continuation | None = None
    tells_origin: bool = False
    conversation: int = 0  # key under which the KV stays cached for `lease` seconds; 0: none
    lease: float = 0.0
    credit: int = -1  # tokens until more are granted; -1: no limit


class Starter:
    """Submits generations to the model's engine."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    def submit(self, start: Start, guard: RequestGuard, mailbox: Mailbox) -> list[Generation]:
        """The n generations of a request, running. Takes the guard's share of tokens first. Raises ServerError, and has
        started nothing then."""
        host = self._host
        client, front = host.client(), host.front()
        params = start.sampling
        num_prompt = len(start.ids)
        max_tokens = validate.check_length(num_prompt, params, host.limits(), start.path)
        seeds = convert.seeds(params)
        if start.continuation is None:  # else it is in force already
            max_tokens = guard.cap_max_tokens(max_tokens, params.min_tokens)
        guard.begin(num_prompt, max_tokens)
        common = convert.Common(start.ids, start.salt, start.deadline, time.monotonic(), guard.claim)
        common = replace(common, conversation=start.conversation, lease=start.lease, credit=start.credit)
        made_from = origins(host, start.ids, seeds, max_tokens, params)
        held: list[int] = []
        if start.continuation is not None:
            check_continuation(start.continuation, made_from[0])
            held = list(start.continuation.token_ids)
        generations = []
        for index, seed in enumerate(seeds):
            sampling = convert.sampling(params, max_tokens=max_tokens, seed=seed, end_tokens=front.info.eos_token_ids)
            generation = Generation(
                front.tokenizer, list(params.stop), params.include_stop, index=index, seed=seed, num_prompt=num_prompt
            )
            generation.max_tokens = max_tokens
            generation.origin = made_from[index]
            generation.tells_origin = start.tells_origin
            end = generation.hold(held, sampling, start.path) if held else None
            if end is None:
                generation.stream = client.submit(partial(convert.sequence, common, sampling, held), mailbox)
                generation.stream.on_start = guard.started
                if not start.credit:
                    generation.stream.expect_nothing()
            else:
                guard.started()
                generation.stream = client.answer(end, mailbox)
            generations.append(generation)
        return generations
