"""From what a generation is made, and what proves it later: origins, receipts, and the check of a continuation.

`starter.py` makes an origin per generation; `generation.py` carries it to the first chunk and into the receipt of the
last; `convert.py` turns both into protobuf.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from headrace.models.digest import token_hash
from headrace.server import errors
from headrace.server.errors import ServerError
from headrace.server.model_host import ModelHost
from headrace.v1 import inference_pb2 as pb

_VERSION = version("headrace")


@dataclass(frozen=True)
class Origin:
    """headrace.v1.Origin, and what else a receipt says before anything was generated. sampling: as asked for."""

    prompt_hash: str
    model_digest: str
    tokenizer_digest: str
    arithmetic: str
    seed: int
    max_tokens: int
    model: str
    server_version: str
    sampling: pb.SamplingParams


@dataclass(frozen=True)
class Receipt:
    """headrace.v1.Receipt."""

    origin: Origin
    token_hash: str
    num_tokens: int


class TokenHasher:
    """The hash of a generation's tokens as they come (`headrace.models.digest.token_hash`)."""

    def __init__(self) -> None:
        self._ids: list[int] = []  # hashed at the end: one call per token would cost as much as turning it into text

    def update(self, ids: Iterable[int]) -> None:
        self._ids += ids

    def hexdigest(self) -> str:
        return token_hash(self._ids)


def origins(
    host: ModelHost, prompt: Sequence[int], seeds: Sequence[int], max_tokens: int, sampling: pb.SamplingParams
) -> list[Origin]:
    """One per seed. Raises ServerError while the model is not known."""
    identity = host.identity()
    prompt_hash = token_hash(prompt)
    return [
        Origin(
            prompt_hash=prompt_hash,
            model_digest=identity.model_digest,
            tokenizer_digest=identity.tokenizer_digest,
            arithmetic=host.arithmetic,
            seed=seed,
            max_tokens=max_tokens,
            model=host.name,
            server_version=_VERSION,
            sampling=sampling,
        )
        for seed in seeds
    ]


def check_continuation(continuation: pb.Continuation, origin: Origin) -> None:
    """What is to be continued began here or on a server that would have said the same. Raises ServerError."""
    if continuation.model_digest != origin.model_digest:
        raise ServerError(errors.MODEL_DIFFERS)
    if continuation.arithmetic and continuation.arithmetic != origin.arithmetic:
        raise ServerError(errors.ARITHMETIC_DIFFERS)
    if continuation.prompt_hash != origin.prompt_hash:
        raise ServerError(errors.PROMPT_DIFFERS)
