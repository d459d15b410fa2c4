"""Every field of every request at its limits and beyond, through every entry point that takes it.

The table is checked against the descriptors: a field that is added to the protos without a row here fails the build.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import models_pb2

from tests.server.scripted_engine import CONTEXT_LENGTH, VOCAB_SIZE
from tests.server.support import Bench, chat_prompt, drained, failure, tokens_request

pytestmark = pytest.mark.asyncio(loop_scope="session")

U32 = 2**32 - 1
NOT_NUMBERS = [math.nan, math.inf, -math.inf]
USER = pb.ChatMessage(role=pb.ROLE_USER, content="hi")


@dataclass(frozen=True)
class Row:
    """Values of one field that are taken, and values that are refused; `at` is the path the fault names, if another."""

    good: list[Any]
    bad: list[Any]
    at: str = ""


GENERATE: dict[str, Row] = {
    "model": Row(["", "tiny"], []),  # other names: MODEL_NOT_FOUND, see test_errors.py
    "prompt.text": Row(["x", "é" * 20], [""]),
    "prompt.chat.messages": Row([[USER], [pb.ChatMessage(role=pb.ROLE_TOOL)] * 9], [[]]),
    "prompt.chat.messages.role": Row([1, 2, 3, 4], [0, 5, -1, 2**31 - 1], at="prompt.chat.messages[0].role"),
    "prompt.chat.messages.content": Row(["", "x" * 50], []),
    "prompt.chat.omit_generation_prompt": Row([False, True], []),
    "prompt.tokens.ids": Row([[0], [VOCAB_SIZE - 1], [9] * (CONTEXT_LENGTH - 8)], [[], [9] * (CONTEXT_LENGTH + 1)]),
    "sampling.temperature": Row([0.0, -0.0, 1e-30, 100.0], [-0.001, 100.1, *NOT_NUMBERS]),
    "sampling.top_k": Row([0, 1, VOCAB_SIZE], [VOCAB_SIZE + 1, U32]),
    "sampling.top_p": Row([1e-7, 1.0], [0.0, -0.5, 1.001, *NOT_NUMBERS]),
    "sampling.min_p": Row([0.0, 1.0], [-1e-7, 1.001, *NOT_NUMBERS]),
    "sampling.repetition_penalty": Row([0.01, 10.0], [0.0, -1.0, 10.1, *NOT_NUMBERS]),
    "sampling.presence_penalty": Row([-2.0, 2.0], [-2.001, 2.001, *NOT_NUMBERS]),
    "sampling.frequency_penalty": Row([-2.0, 2.0], [-2.001, 2.001, *NOT_NUMBERS]),
    "sampling.logit_bias": Row(
        [{}, {0: 1.0}, dict.fromkeys(range(VOCAB_SIZE), -1.0)], [dict.fromkeys(range(1025), 0.0)]
    ),
    "sampling.logit_bias.key": Row([VOCAB_SIZE - 1], [VOCAB_SIZE, U32]),
    "sampling.logit_bias.value": Row([-100.0, 100.0], [-100.1, 100.1, *NOT_NUMBERS], at="sampling.logit_bias[3]"),
    "sampling.seed": Row([0, 1, 2**64 - 1], []),
    "sampling.max_tokens": Row([0, 1, CONTEXT_LENGTH - 3], [CONTEXT_LENGTH, U32]),
    "sampling.min_tokens": Row([0, 8], [9, U32]),  # max_tokens is 8
    "sampling.stop": Row([[], ["x"] * 16, ["é" * 128]], [["x"] * 17]),
    "sampling.stop_token_ids": Row([[], [VOCAB_SIZE - 1] * 64], [[1] * 65]),
    "sampling.ignore_eos": Row([False, True], []),
    "sampling.logprobs": Row([0, 20], [21, U32]),
    "sampling.n": Row([0, 1, 16], [17, U32]),
    "sampling.include_stop": Row([False, True], []),
    "request_label": Row(["", "a b~", "x" * 128], ["x" * 129, "tab\t", "new\nline", "é", "\x7f", "\x00"]),
    "priority": Row([0, 1, 2, 3], [4, -1, 2**31 - 1]),
    "cache_salt": Row(["", "x" * 128, "é" * 64, "\x00\n"], ["x" * 129, "é" * 65]),
}
# Fields of the other requests; paths that begin with "request" hold a GenerateRequest and are covered by GENERATE.
OTHERS: dict[str, dict[str, Row]] = {
    "TokenizeRequest": {
        "model": GENERATE["model"],
        **{path: row for path, row in GENERATE.items() if path.startswith("prompt.") and "tokens" not in path},
        "prompt.tokens.ids": Row([], [[1]], at="prompt.tokens"),
    },
    "DetokenizeRequest": {
        "model": GENERATE["model"],
        "token_ids": Row([[0, VOCAB_SIZE - 1], [1] * 5000], [[], [1] * (2**20 + 1)]),
        "skip_special_tokens": Row([False, True], []),
    },
    "ScoreRequest": {
        "model": GENERATE["model"],
        **{path: row for path, row in GENERATE.items() if path.startswith("prompt.")},
        "prompt.text": Row(["xyz"], [""]),
        "prompt.tokens.ids": Row([[5, 6], [9] * CONTEXT_LENGTH], [[], [9] * (CONTEXT_LENGTH + 1)]),
        "top_logprobs": Row([0, 20], [21, U32]),
        "request_label": GENERATE["request_label"],
    },
    "GetModelRequest": {"model": GENERATE["model"]},
    "ListModelsRequest": {},
}
# What test_resume.py takes through its paces.
IN_RESUME_TESTS = {
    "continuation.token_ids",
    "continuation.prompt_hash",
    "continuation.model_digest",
    "continuation.arithmetic",
    "resumable",
}
# Commands of a session, which test_session.py and test_session_control.py take through their paces.
IN_SESSION_TESTS = {
    "SessionStart": {"generation_id", "request", "conversation_id", "credit_tokens"},
    "SessionAppend": {"generation_id", "conversation_id", "messages", "sampling", "credit_tokens"},
    "SessionCancel": {"generation_id"},
    "SessionInterrupt": {"generation_id", "heard_tokens"},
    "SessionPause": {"generation_id"},
    "SessionResume": {"generation_id"},
    "SessionCredit": {"generation_id", "tokens"},
    "SessionUpdate": {"generation_id", "max_tokens", "stop_conditions"},
    "StopConditions": {"stop", "stop_token_ids", "ignore_eos"},
    "SessionPing": {"nonce"},
}


def _paths(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all fields that hold values."""
    for field in descriptor.fields:
        path = prefix + field.name
        if field.type != FieldDescriptor.TYPE_MESSAGE:
            yield path
        elif path in ("prompt.chat.messages", "sampling.logit_bias"):
            yield path
            yield from _paths(field.message_type, f"{path}.")
        else:
            yield from _paths(field.message_type, f"{path}.")


async def test_every_field_has_a_row() -> None:
    assert set(_paths(pb.GenerateRequest.DESCRIPTOR)) == set(GENERATE) | IN_RESUME_TESTS
    for module in (pb, models_pb2):
        for name, message in module.DESCRIPTOR.message_types_by_name.items():
            if name in OTHERS:
                assert set(_paths(message)) == set(OTHERS[name]), name
            elif name in IN_SESSION_TESTS:
                assert {field.name for field in message.fields} == IN_SESSION_TESTS[name]
            else:
                assert not name.endswith("Request") or name in (
                    "GenerateRequest",
                    "CompleteRequest",
                    "SessionRequest",
                    "ResumeRequest",
                    "CancelRequest",
                ), name


def _with(base: Message, path: str, value: Any) -> Message:
    """A copy of `base` with one field set."""
    request = type(base)()
    request.CopyFrom(base)
    if path == "sampling.logit_bias.key":
        request.sampling.logit_bias[value] = 1.0  # type: ignore[attr-defined]
        return request
    if path == "sampling.logit_bias.value":
        request.sampling.logit_bias[3] = value  # type: ignore[attr-defined]
        return request
    if path.startswith("prompt.chat."):
        request.prompt.CopyFrom(chat_prompt("hi"))  # type: ignore[attr-defined]
    *parents, name = path.split(".")
    target: Any = request
    for parent in parents:
        target = getattr(target, parent)
        target = target[0] if parent == "messages" else target
    if isinstance(value, dict):
        getattr(target, name).update(value)
    elif isinstance(value, list):
        target.ClearField(name)
        if not value and name in ("ids", "messages"):
            target.SetInParent()
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)
    return request


def _path_at_fault(path: str, row: Row, value: Any) -> str:
    if path == "sampling.logit_bias.key":
        return f"sampling.logit_bias[{value}]"
    return row.at or path


async def _check(call: Any, request: Message, field: str, *, is_good: bool) -> None:
    if is_good:
        await call
        return
    failed = await failure(call)
    assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST"), str(request)[:200]
    assert failed.fields == (field,)


@pytest.mark.parametrize("path", GENERATE)
async def test_generate_takes_its_limits_and_refuses_what_is_beyond(counting: Bench, path: str) -> None:
    row = GENERATE[path]
    for value in [*row.good, *row.bad]:
        request = _with(tokens_request([9, 8, 7]), path, value)
        is_good = any(value is good for good in row.good)
        field = _path_at_fault(path, row, value)
        await _check(drained(counting.stub.Generate(request)), request, field, is_good=is_good)
        if not is_good:
            whole = pb.CompleteRequest(request=request)
            await _check(counting.stub.Complete(whole), request, f"request.{field}", is_good=False)


async def test_session_refuses_the_same_fields_for_the_same_reasons(counting: Bench) -> None:
    call = counting.stub.Session()
    for path, row in GENERATE.items():
        for value in row.bad:
            request = _with(tokens_request([9, 8, 7]), path, value)
            start = pb.SessionStart(generation_id="a", request=request)
            await call.write(pb.SessionRequest(start=start))
            error = (await call.read()).error
            assert (error.code, error.reason) == (3, "INVALID_REQUEST")
            assert error.field == f"start.request.{_path_at_fault(path, row, value)}"
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    ("method", "path"),
    [(name.removesuffix("Request"), path) for name, rows in OTHERS.items() for path in rows],
)
async def test_the_other_methods_take_their_limits_and_refuse_what_is_beyond(
    counting: Bench, method: str, path: str
) -> None:
    bases: dict[str, Message] = {
        "Tokenize": pb.TokenizeRequest(prompt=pb.Prompt(text="x")),
        "Detokenize": pb.DetokenizeRequest(token_ids=[5]),
        "Score": pb.ScoreRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5, 6]))),
        "GetModel": models_pb2.GetModelRequest(),
    }
    stub = counting.models if method == "GetModel" else counting.stub
    row = OTHERS[f"{method}Request"][path]
    for value in [*row.good, *row.bad]:
        request = _with(bases[method], path, value)
        is_good = any(value is good for good in row.good)
        await _check(getattr(stub, method)(request), request, row.at or path, is_good=is_good)


async def test_faults_inside_lists_name_their_place(counting: Bench) -> None:
    request = tokens_request([5, VOCAB_SIZE, 6, U32], stop=["ok", "", "x" * 257], stop_token_ids=[1, VOCAB_SIZE])
    failed = await failure(drained(counting.stub.Generate(request)))
    assert failed.fields == (
        "prompt.tokens.ids[1]",
        "sampling.stop[1]",
        "sampling.stop[2]",
        "sampling.stop_token_ids[1]",
    )
    many = pb.GenerateRequest(prompt=pb.Prompt(chat=pb.ChatPrompt(messages=[USER] * 1025)))
    assert (await failure(drained(counting.stub.Generate(many)))).fields == ("prompt.chat.messages",)


async def test_all_faults_of_a_request_are_told_at_once(counting: Bench) -> None:
    request = tokens_request([], temperature=-1.0, top_p=0.0, n=99, max_tokens=2**31, stop=["x"] * 17)
    request.request_label = "\n"
    failed = await failure(drained(counting.stub.Generate(request)))
    assert set(failed.fields) == {
        "prompt.tokens.ids",
        "sampling.temperature",
        "sampling.top_p",
        "sampling.n",
        "sampling.max_tokens",
        "sampling.stop",
        "request_label",
    }


async def test_prompt_and_max_tokens_share_the_context(counting: Bench) -> None:
    fits = tokens_request([9] * (CONTEXT_LENGTH - 8), max_tokens=8)
    assert len(await drained(counting.stub.Generate(fits))) > 0
    for ids, max_tokens, field in (
        (CONTEXT_LENGTH - 7, 8, "sampling.max_tokens"),
        (CONTEXT_LENGTH, 1, "prompt"),
        (CONTEXT_LENGTH, 0, "prompt"),
    ):
        request = tokens_request([9] * ids, max_tokens=max_tokens)
        failed = await failure(drained(counting.stub.Generate(request)))
        assert (failed.code, failed.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
        assert failed.fields == (field,)
    long_text = pb.GenerateRequest(prompt=pb.Prompt(text="water " * 20_000))  # tokenised in a thread
    failed = await failure(drained(counting.stub.Generate(long_text)))
    assert (failed.reason, failed.fields) == ("PROMPT_TOO_LONG", ("prompt",))
    score = pb.ScoreRequest(prompt=pb.Prompt(text="water " * 2_000))
    failed = await failure(counting.stub.Score(score))
    assert (failed.reason, failed.fields) == ("PROMPT_TOO_LONG", ("prompt",))
    one_token = pb.ScoreRequest(prompt=pb.Prompt(tokens=pb.TokenIds(ids=[5])))
    assert (await failure(counting.stub.Score(one_token))).fields == ("prompt",)


async def test_min_tokens_is_held_against_the_max_tokens_in_force(counting: Bench) -> None:
    request = tokens_request([9] * (CONTEXT_LENGTH - 5), max_tokens=0, min_tokens=6)  # room for 5
    failed = await failure(drained(counting.stub.Generate(request)))
    assert failed.fields == ("sampling.min_tokens",)
