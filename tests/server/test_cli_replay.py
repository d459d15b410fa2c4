"""`headrace generate --receipt` and `headrace replay`: a generation on file is proved, or what differs is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from headrace.client import Client
from headrace.client.receipts import Record, replay

from tests.server.cli_support import Invoke, invoke, spawned
from tests.support.live_server import LiveServer

__all__ = ["invoke"]  # a fixture


@pytest.fixture
def receipt(invoke: Invoke, live_server: LiveServer, tmp_path: Path) -> Path:
    path = tmp_path / "receipt.json"
    done = invoke("generate", "Water", "-n", "12", "--seed", "3", "-t", live_server.target, "--receipt", str(path))
    assert done.status == 0
    assert done.out
    return path


def test_the_same_server_proves_it(invoke: Invoke, live_server: LiveServer, receipt: Path) -> None:
    done = invoke("replay", str(receipt), "-t", live_server.target)
    assert done.status == 0
    assert "same 12 tokens" in done.out
    assert json.loads(receipt.read_text())["receipt"]["sampling"]["seed"] == 3


def test_another_model_is_named_and_so_are_its_tokens(invoke: Invoke, tiny_llama_gguf: Path, receipt: Path) -> None:
    """The counting engine made it; the real one generates otherwise, by another arithmetic."""
    done = invoke("replay", str(receipt), "--model-file", str(tiny_llama_gguf), "--json")
    assert done.status == 1
    answer = json.loads(done.out)
    named = [difference["what"] for difference in answer["differences"]]
    assert (answer["is_same"], named) == (False, ["arithmetic", "tokens from index 0 on"])


def test_a_model_file_proves_what_a_server_made_of_it(invoke: Invoke, tiny_llama_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    with spawned("serve", "--json", "--port", "0", "--model", str(tiny_llama_gguf)) as server:
        assert server.stdout is not None
        target = json.loads(server.stdout.readline())["target"]
        made = invoke("generate", "Water", "-n", "20", "-t", target, "--chat", "--resume", "--receipt", str(path))
        assert made.status == 0
    done = invoke("replay", str(path), "--model-file", str(tiny_llama_gguf))
    assert (done.status, done.out[:7]) == (0, "same 20")


def test_a_file_that_was_changed_is_refused(invoke: Invoke, live_server: LiveServer, receipt: Path) -> None:
    document = json.loads(receipt.read_text())
    document["token_ids"][3] += 1
    receipt.write_text(json.dumps(document))
    done = invoke("replay", str(receipt), "-t", live_server.target)
    assert done.status == 1
    assert "the file was changed" in done.err
    for text in ("", "{}", "[]", '{"format": "x"}', '{"format": "headrace-receipt/1", "receipt": {}}'):
        receipt.write_text(text)
        assert invoke("replay", str(receipt), "-t", live_server.target).status == 1


def test_what_was_stopped_early_proves_its_beginning(live_server: LiveServer) -> None:
    with Client(live_server.target) as client:
        bias = {50: 1.0}
        (whole,) = client.complete(token_ids=[9], max_tokens=20, temperature=0, seed=1, logit_bias=bias, stop=["zzz"])
        assert whole.finish.receipt is not None
        record = Record({"token_ids": [9]}, whole.token_ids, whole.finish.receipt)
        assert Record.from_json(record.to_json()) == record
        assert replay(client, record) == []
        (difference,) = replay(client, Record({"token_ids": [10]}, whole.token_ids, whole.finish.receipt))[:1]
        assert difference.what == "prompt hash"
