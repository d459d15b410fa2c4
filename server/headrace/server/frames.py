"""The closed schema of what the front end and the engine process say to each other, and its framing on the socket.

Written by `engine_client` and `engine_main`, nobody else. A frame is a 4-byte big-endian length and that many bytes of
MessagePack; the type of a message is one of the tagged structs below, so that nothing but plain data can arrive. A
frame over MAX_FRAME_BYTES or of an unknown shape ends the connection: the two ends belong together and trust no third.
"""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

import msgspec
from headrace.engine.types import EngineStats, SequenceOutput, SequenceRequest, StepRecord

# The largest frames: a prompt of a 1 M-token context (5 bytes an id), or a step of 4,096 scored rows with 20
# alternatives each.
MAX_FRAME_BYTES = 8 << 20
_HEADER_BYTES = 4


class FrameError(Exception):
    """The other end broke the framing or the schema."""


# ---- front end -> engine ------------------------------------------------------------------------------------------


class Load(msgspec.Struct, frozen=True, tag="load", forbid_unknown_fields=True):
    """The first frame: what to load and how to run it. Counts that are 0 are chosen by the engine process."""

    path: str
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    max_live_sequences: int
    max_live_tokens: int
    num_threads: int
    enable_prefix_cache: bool
    backend: str = "auto"
    kv_dtype: str = "auto"
    activation_bits: Literal[8, 16] = 8
    kv_cache_tokens: int = 0
    compute_dtype: str = "auto"
    attention: str = "auto"
    gpu_memory_fraction: float = 0.92
    swap_space_bytes: int = 0
    quantization: str = "none"


class Submit(msgspec.Struct, frozen=True, tag="submit", forbid_unknown_fields=True):
    """Run a sequence."""

    request: SequenceRequest


class Cancel(msgspec.Struct, frozen=True, tag="cancel", forbid_unknown_fields=True):
    """Stop a sequence; unknown ids are ignored."""

    id: int


class SetMaxTokens(msgspec.Struct, frozen=True, tag="max_tokens", forbid_unknown_fields=True):
    """Change how many tokens a sequence may generate."""

    id: int
    max_tokens: int


class SetStopTokens(msgspec.Struct, frozen=True, tag="stop_tokens", forbid_unknown_fields=True):
    """Change the tokens that end a sequence."""

    id: int
    token_ids: tuple[int, ...]


class Grant(msgspec.Struct, frozen=True, tag="grant", forbid_unknown_fields=True):
    """Let a sequence have so many output tokens in all; ignored for unknown ids, as are the two above and below."""

    id: int
    credit: int


class Unpin(msgspec.Struct, frozen=True, tag="unpin", forbid_unknown_fields=True):
    """Nobody comes back to this conversation: its KV need not stay cached."""

    conversation: int


class Park(msgspec.Struct, frozen=True, tag="park", forbid_unknown_fields=True):
    """Do not schedule a sequence: its reader is behind, or it is paused."""

    id: int


class Unpark(msgspec.Struct, frozen=True, tag="unpark", forbid_unknown_fields=True):
    """Schedule it again."""

    id: int


class Ping(msgspec.Struct, frozen=True, tag="ping", forbid_unknown_fields=True):
    """Asks for a Pong between two steps: proof that the engine's one thread makes progress."""

    nonce: int


ToEngine = Load | Submit | Cancel | SetMaxTokens | SetStopTokens | Grant | Unpin | Park | Unpark | Ping

# ---- engine -> front end ------------------------------------------------------------------------------------------


class Loading(msgspec.Struct, frozen=True, tag="loading", forbid_unknown_fields=True):
    """Share of the weights read so far, 0 to 1."""

    progress: float


class LoadFailed(msgspec.Struct, frozen=True, tag="load_failed", forbid_unknown_fields=True):
    """The model cannot be run. `message` is for the operator's log, never for a client."""

    message: str


class Ready(msgspec.Struct, frozen=True, tag="ready", forbid_unknown_fields=True):
    """The engine answers from now on."""

    backend: str
    num_threads: int
    max_model_len: int
    stats: EngineStats
    block_size: int = 16
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    arithmetic: str = ""  # what decides the bits of the logits, besides the model; see Origin.arithmetic


class Refused(msgspec.Struct, frozen=True, tag="refused", forbid_unknown_fields=True):
    """A submitted sequence was not accepted; nothing else is said about it. reason: "queue_full" or "invalid"."""

    id: int
    reason: str


class Step(msgspec.Struct, frozen=True, tag="step", forbid_unknown_fields=True):
    """What one step did, for all sequences."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    record: StepRecord | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong", forbid_unknown_fields=True):
    """The answer to a Ping."""

    nonce: int
    stats: EngineStats


ToFront = Loading | LoadFailed | Ready | Refused | Step | Pong

# ---- framing ------------------------------------------------------------------------------------------------------

_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(message: ToEngine | ToFront) -> bytes:
    """One framed message. Raises FrameError where it is larger than MAX_FRAME_BYTES."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit")
    return len(body).to_bytes(_HEADER_BYTES, "big") + body


class FrameDecoder(Generic[T]):
    """Cuts a byte stream into messages; holds at most one unfinished frame and what `feed` was given."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[T]:
        """All messages completed by `data`. Raises FrameError; the stream cannot be used after that."""
        buffer = self._buffer
        buffer += data
        messages: list[T] = []
        start = 0
        while len(buffer) - start >= _HEADER_BYTES:
            size = int.from_bytes(buffer[start : start + _HEADER_BYTES], "big")
            if size > MAX_FRAME_BYTES:
                raise FrameError(f"a frame of {size} bytes is over the limit")
            end = start + _HEADER_BYTES + size
            if len(buffer) < end:
                break
            try:
                messages.append(self._decoder.decode(memoryview(buffer)[start + _HEADER_BYTES : end]))
            except msgspec.MsgspecError as error:
                raise FrameError("a frame does not fit the schema") from error
            start = end
        del buffer[:start]
        return messages


def engine_decoder() -> FrameDecoder[ToEngine]:
    """Decodes what the front end sends."""
    return FrameDecoder(msgspec.msgpack.Decoder(ToEngine))


def front_decoder() -> FrameDecoder[ToFront]:
    """Decodes what the engine sends."""
    return FrameDecoder(msgspec.msgpack.Decoder(ToFront))
