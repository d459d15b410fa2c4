"""From a tokenised prompt to running sequences: what Generate, Complete and Session have in common."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

from headrace.server import convert, validate
from headrace.server.admission import RequestGuard
from headrace.server.engine_client import Mailbox
from headrace.server.generation import Generation
from headrace.server.model_host import ModelHost
from headrace.v1 import inference_pb2 as pb


@dataclass(frozen=True)
class Start:
    """What to run. deadline: CLOCK_MONOTONIC seconds. path: where the request sits in its message, for faults."""

    ids: list[int]
    sampling: pb.SamplingParams
    salt: str
    deadline: float
    path: str = ""


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
        guard.reserve_tokens(len(seeds) * (num_prompt + max_tokens))
        common = convert.Common(start.ids, start.salt, start.deadline, time.monotonic())
        generations = []
        for index, seed in enumerate(seeds):
            sampling = convert.sampling(params, max_tokens=max_tokens, seed=seed, end_tokens=front.info.eos_token_ids)
            generation = Generation(
                front.tokenizer, list(params.stop), params.include_stop, index=index, seed=seed, num_prompt=num_prompt
            )
            generation.max_tokens = max_tokens
            generation.stream = client.submit(partial(convert.sequence, common, sampling), mailbox)
            generations.append(generation)
        return generations
