"""Messages written by hand are those of the generated code, to the last byte."""

from __future__ import annotations

from headrace.engine.types import TokenOutput
from headrace.server import convert
from headrace.server.generation import Chunk
from headrace.v1 import inference_pb2 as pb
from hypothesis import given
from hypothesis import strategies as st

U32 = st.one_of(st.integers(0, 300), st.integers(0, 2**32 - 1))


@given(
    index=st.integers(0, 15),
    offset=U32,
    ids=st.lists(U32, min_size=1, max_size=40),
    text=st.text(max_size=60),
    name=st.sampled_from(["", "0123456789abcdef" * 2]),
)
def test_the_usual_message(index: int, offset: int, ids: list[int], text: str, name: str) -> None:
    news = Chunk(offset, [TokenOutput(token_id) for token_id in ids], text, None, name)
    by_hand = convert.generate_response(index, news)
    message = pb.GenerateResponse(chunk=convert.chunk(index, news))
    assert by_hand == message.SerializeToString()
    assert pb.GenerateResponse.FromString(by_hand) == message


def test_what_is_not_usual_has_all_its_fields() -> None:
    news = Chunk(3, [TokenOutput(7, -0.5, ((8, -1.0),))], "x", None, "ab")
    parsed = pb.GenerateResponse.FromString(convert.generate_response(0, news))
    assert parsed.chunk == convert.chunk(0, news)
    assert parsed.chunk.logprobs[0].alternatives[0].token_id == 8
    flushed = Chunk(3, [], "rest", None, "ab")
    assert pb.GenerateResponse.FromString(convert.generate_response(1, flushed)).chunk == convert.chunk(1, flushed)
