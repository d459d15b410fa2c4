"""The usual message of a stream, a token and its text, put on the wire by hand. Called by `convert.generate_response`.

Through the generated classes it took a third of the front end's time per message: two messages on two arenas, made and
thrown away for some sixty bytes (docs/LOG.md). Fields are written in the order of their numbers, as the generated code
does; a test compares the two over many messages.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tags: field number << 3 | wire type (0 varint, 2 length-delimited), headrace/v1/inference.proto.
_RESPONSE_CHUNK = b"\x0a"
_INDEX, _OFFSET, _TOKEN_IDS, _TEXT, _GENERATION_ID = b"\x08", b"\x10", b"\x1a", b"\x22", b"\x3a"
_SMALL = tuple(bytes((number,)) for number in range(128))


def varint(number: int) -> bytes:
    """A non-negative integer in base 128, least significant group first."""
    if number < 128:
        return _SMALL[number]
    if number < 16384:
        return bytes((number & 127 | 128, number >> 7))
    groups = bytearray()
    while number >= 128:
        groups.append(number & 127 | 128)
        number >>= 7
    groups.append(number)
    return bytes(groups)


def generate_response(index: int, offset: int, token_ids: Sequence[int], text: str, generation_id: str) -> bytes:
    """A GenerateResponse whose chunk has these fields and no others. token_ids: at least one."""
    ids = varint(token_ids[0]) if len(token_ids) == 1 else b"".join([varint(token_id) for token_id in token_ids])
    chunk = _TOKEN_IDS + varint(len(ids)) + ids
    if offset:
        chunk = _OFFSET + varint(offset) + chunk
    if index:
        chunk = _INDEX + varint(index) + chunk
    if text:
        encoded = text.encode()
        chunk += _TEXT + varint(len(encoded)) + encoded
    if generation_id:
        chunk += _GENERATION_ID + varint(len(generation_id)) + generation_id.encode("ascii")
    return _RESPONSE_CHUNK + varint(len(chunk)) + chunk
