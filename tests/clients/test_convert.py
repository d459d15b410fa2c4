"""From plain values to messages and back: what absence, zero and nonsense become."""

from __future__ import annotations

from typing import Any

import pytest
from headrace.client import Chunk, Finish, Message, Timing, TokenAlternative, TokenLogprob, Usage, connection, convert
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import models_pb2
from opentelemetry.sdk.trace import TracerProvider


def test_a_prompt_has_exactly_one_form() -> None:
    assert convert.make_prompt("x", None, None).WhichOneof("form") == "text"
    assert convert.make_prompt(None, [Message("user", "x")], None).WhichOneof("form") == "chat"
    assert list(convert.make_prompt(None, None, [1, 2]).tokens.ids) == [1, 2]
    # The empty text is a prompt (the server refuses it, and says why); no prompt is a mistake of the caller.
    assert convert.make_prompt("", None, None).WhichOneof("form") == "text"
    for forms in ((None, None, None), ("x", None, [1]), ("x", [], None)):
        with pytest.raises(TypeError, match="exactly one"):
            convert.make_prompt(*forms)


def test_messages_and_mappings_mean_the_same() -> None:
    plain: list[Message | dict[str, str]] = [Message("system", "a"), {"role": "tool", "content": "b"}]
    assert convert.make_messages(plain) == [
        pb.ChatMessage(role=pb.ROLE_SYSTEM, content="a"),
        pb.ChatMessage(role=pb.ROLE_TOOL, content="b"),
    ]


@pytest.mark.parametrize(
    "message", [{"role": "narrator", "content": "x"}, {"role": "user"}, {"role": "user", "content": "x", "name": "y"}]
)
def test_a_malformed_message_is_refused_here(message: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"role|keys"):
        convert.make_messages([message])


def test_absent_sampling_parameters_stay_absent_and_zeros_are_sent() -> None:
    sampling = convert.make_sampling(
        {"temperature": 0.0, "seed": 0, "logprobs": 0, "logit_bias": {5: -1.0}, "stop": ["x"]}
    )
    assert sampling.HasField("temperature")
    assert sampling.HasField("seed")
    assert sampling.HasField("logprobs")
    assert not sampling.HasField("top_p")
    assert dict(sampling.logit_bias) == {5: -1.0}
    assert convert.make_sampling({}) == pb.SamplingParams()
    nothing: Any = {"temperature": None}
    assert convert.make_sampling(nothing) == pb.SamplingParams()


def test_a_misspelt_sampling_parameter_is_refused_here() -> None:
    wrong: Any = {"max_token": 3, "temprature": 1}
    with pytest.raises(TypeError, match="max_token, temprature"):
        convert.make_sampling(wrong)


def test_append_without_sampling_leaves_the_field_unset() -> None:
    assert not convert.make_append("c", "hi", {}).HasField("sampling")
    append = convert.make_append("c", [Message("tool", "42"), Message("user", "hi")], {"max_tokens": 3})
    assert append.sampling.max_tokens == 3
    assert [turn.role for turn in append.messages] == [pb.ROLE_TOOL, pb.ROLE_USER]
    assert [turn.role for turn in convert.make_append("c", "hi", {}).messages] == [pb.ROLE_USER]


def test_a_chunk_comes_back_whole() -> None:
    finish = pb.Finish(
        reason=pb.FINISH_REASON_STOP,
        stop_token_id=0,
        usage=pb.Usage(prompt_tokens=3, cached_prompt_tokens=2, generated_tokens=1),
        timing=pb.Timing(queue_seconds=0.1, prefill_seconds=0.2, decode_seconds=0.3),
        seed=9,
    )
    logprob = pb.TokenLogprob(token_id=7, logprob=-0.5, alternatives=[pb.TokenAlternative(token_id=8, logprob=-1.5)])
    message = pb.GenerationChunk(index=1, offset=4, token_ids=[7], text="é", logprobs=[logprob], finish=finish)
    assert convert.to_chunk(message) == Chunk(
        index=1,
        offset=4,
        token_ids=(7,),
        text="é",
        logprobs=(TokenLogprob(7, -0.5, (TokenAlternative(8, -1.5),)),),
        finish=Finish("stop", "", 0, Usage(3, 2, 1), Timing(0.1, 0.2, 0.3), 9),
    )
    assert convert.to_chunk(pb.GenerationChunk(text="x")).finish is None
    assert convert.to_finish(pb.Finish()).stop_token_id is None


def test_enumerators_of_a_newer_server_are_survived() -> None:
    finish, model = pb.Finish(), models_pb2.Model()
    finish.MergeFromString(b"\x08\x63")  # reason = 99
    model.MergeFromString(b"\x10\x63")  # state = 99
    assert convert.to_finish(finish).reason == "error"
    assert convert.to_model(model).state == "failed"


def test_the_callers_trace_goes_along() -> None:
    provider = TracerProvider()
    with provider.get_tracer("t").start_as_current_span("caller") as span:
        metadata = dict(connection.merge_metadata({"A": "b"}, None) or ())
    trace_id, span_id = metadata["traceparent"].split("-")[1:3]
    assert metadata["a"] == "b"
    assert (int(trace_id, 16), int(span_id, 16)) == (span.get_span_context().trace_id, span.get_span_context().span_id)
    assert connection.merge_metadata(None, None) is None
    with provider.get_tracer("t").start_as_current_span("caller"):
        assert connection.merge_metadata(None, {"traceparent": "mine"}) == (("traceparent", "mine"),)


def test_a_priority_is_one_of_three() -> None:
    prompt = convert.make_prompt("x", None, None)
    plain: Any = {"model": "", "label": "", "cache_salt": ""}
    assert convert.make_generate(prompt, {}, **plain).priority == pb.PRIORITY_STANDARD
    assert convert.make_generate(prompt, {}, **plain, priority="batch").priority == pb.PRIORITY_BATCH
    with pytest.raises(TypeError, match="interactive, standard, batch"):
        convert.make_generate(prompt, {}, **plain, priority="urgent")  # type: ignore[arg-type]
