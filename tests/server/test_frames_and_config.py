"""The frames between the two processes, the configuration, and the log's text form: pure functions at their edges."""

from __future__ import annotations

import json
import logging
import sys
from typing import Literal

import msgspec
import pytest
from headrace.engine.types import EngineStats, SamplingParams, SequenceOutput, SequenceRequest, TokenOutput
from headrace.server import frames
from headrace.server.config import ConfigError, ServerConfig
from headrace.server.logs import formatter

REQUEST = SequenceRequest(
    id=2**62, prompt=[1, 2, 3], sampling=SamplingParams(max_tokens=4, seed=2**64 - 1), deadline=1.5
)


def test_frames_come_out_as_they_went_in_however_the_stream_is_cut() -> None:
    messages = [frames.Submit(REQUEST), frames.Cancel(7), frames.Ping(2**63), frames.Park(1), frames.SetMaxTokens(1, 9)]
    data = b"".join(frames.encode(message) for message in messages)
    for size in (1, 2, 3, 7, len(data)):
        decoder = frames.engine_decoder()
        pieces = [data[start : start + size] for start in range(0, len(data), size)]
        assert [message for piece in pieces for message in decoder.feed(piece)] == messages
    step = frames.Step([SequenceOutput(1, [TokenOutput(5, -1.5, ((5, -1.5),))])], EngineStats(num_steps=3))
    assert frames.front_decoder().feed(frames.encode(step)) == [step]


@pytest.mark.parametrize(
    "body",
    [
        msgspec.msgpack.encode({"type": "cancel", "id": "7"}),
        msgspec.msgpack.encode({"type": "cancel", "id": 7, "more": 1}),
        msgspec.msgpack.encode({"type": "nothing"}),
        msgspec.msgpack.encode({"type": "pong", "nonce": 1}),  # the other direction's
        msgspec.msgpack.encode([1, 2]),
        b"\xc1",
        b"",
    ],
)
def test_a_frame_outside_the_schema_is_an_error(body: bytes) -> None:
    with pytest.raises(frames.FrameError):
        frames.engine_decoder().feed(len(body).to_bytes(4, "big") + body)


def test_a_frame_over_the_limit_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(frames.FrameError):
        frames.engine_decoder().feed((frames.MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    too_long = msgspec.structs.replace(REQUEST, prompt=[2**31] * 2_000_000)
    with pytest.raises(frames.FrameError):
        frames.encode(frames.Submit(too_long))


def test_all_faults_of_a_configuration_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        ServerConfig(port=70_000, model="", stall_timeout=-1.0, default_deadline=100.0, max_deadline=50.0)
    assert len(caught.value.problems) == 4
    assert all(name in str(caught.value) for name in ("port", "model", "stall_timeout", "default_deadline"))
    with pytest.raises(ConfigError, match="max_num_seqs must be of type int"):
        ServerConfig(max_num_seqs="8")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        ServerConfig(no_such_option=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("smollm2-135m-instruct", "smollm2-135m-instruct"),
        ("/models/My Model.Q4.gguf", "My-Model.Q4"),
        ("hf://owner/name@main", "name"),
        ("./dir/", "dir"),
        ("/", "model"),
    ],
)
def test_a_models_name_is_made_from_its_source(model: str, name: str) -> None:
    assert ServerConfig(model=model).name == name


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_log_line_cannot_be_forged_by_a_label(log_format: Literal["text", "json"]) -> None:
    record = logging.LogRecord("headrace.request", logging.INFO, "", 0, "request", None, None)
    record.fields = {"label": "a b\n2026 ERROR fake\x1b[2J", "status": "OK", "seconds": 0.5}
    line = formatter(log_format).format(record)
    assert line.isprintable()
    if log_format == "json":
        fields = json.loads(line)
        assert (fields["level"], fields["message"], fields["status"], fields["seconds"]) == (
            "info",
            "request",
            "OK",
            0.5,
        )
    else:
        assert "level=info logger=headrace.request message=request" in line
        assert line.endswith("status=OK seconds=0.5")


def test_a_traceback_is_one_line_of_json_and_many_of_text() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", None, sys.exc_info())
    assert "ValueError: bad" in json.loads(formatter("json").format(record))["exception"]
    assert formatter("text").format(record).splitlines()[-1] == "ValueError: bad"
