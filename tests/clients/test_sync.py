"""The blocking client against a whole server. The engine counts: the token after t is t + 1."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from headrace.client import (
    Client,
    DeadlineExceededError,
    FieldViolation,
    InvalidRequestError,
    Message,
    NotFoundError,
    UnavailableError,
)

from tests.support.live_server import LONG, LiveServer


@pytest.fixture
def client(live_server: LiveServer) -> Iterator[Client]:
    with Client(live_server.target) as client:
        yield client
    live_server.wait_idle()


def test_chunks_come_in_order_and_end_with_the_account(client: Client) -> None:
    chunks = list(client.generate(token_ids=[10, 11], max_tokens=6, temperature=0))
    assert [i for chunk in chunks for i in chunk.token_ids] == [12, 13, 14, 15, 16, 17]
    assert [chunk.offset for chunk in chunks if chunk.token_ids] == list(range(6))
    assert [chunk.finish is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    finish = chunks[-1].finish
    assert finish is not None
    assert finish.reason == "length"
    assert (finish.usage.prompt_tokens, finish.usage.generated_tokens) == (2, 6)
    assert finish.timing.decode_seconds > 0


def test_every_form_of_prompt_is_understood(client: Client) -> None:
    ids = client.tokenize("water").token_ids
    from_text = client.complete("water", max_tokens=3, temperature=0)
    from_ids = client.complete(token_ids=ids, max_tokens=3, temperature=0)
    assert [completion.token_ids for completion in from_text] == [completion.token_ids for completion in from_ids]
    tokens = client.tokenize(messages=[Message("user", "water")])
    assert tokens.rendered == "<|im_start|>user\nwater<|im_end|>\n<|im_start|>assistant\n"
    (answer,) = client.complete(messages=[{"role": "user", "content": "water"}], max_tokens=1)
    assert answer.finish.usage.prompt_tokens == len(tokens.token_ids)


def test_sampling_parameters_arrive(client: Client) -> None:
    completions = client.complete(token_ids=[20], max_tokens=9, stop_token_ids=[24], n=2, logprobs=2, seed=7)
    assert [completion.index for completion in completions] == [0, 1]
    assert completions[0].finish.seed == 7
    for completion in completions:
        assert completion.finish.reason == "stop"
        assert completion.finish.stop_token_id == 24
        assert [entry.token_id for entry in completion.logprobs][:3] == [21, 22, 23]
        assert [len(entry.alternatives) for entry in completion.logprobs][:3] == [2, 2, 2]


def test_tokens_and_text(client: Client) -> None:
    text = "Größe 🙂"
    ids = client.tokenize(text).token_ids
    assert client.detokenize(ids) == text
    assert client.detokenize([1, *ids], skip_special_tokens=True) == text
    scores = client.score(text)
    assert scores.token_ids == ids
    assert len(scores.logprobs) == len(ids) - 1


def test_models_are_described(client: Client) -> None:
    (model,) = client.models()
    assert (model.name, model.state, model.architecture, model.backend) == ("tiny", "ready", "llama", "counting")
    assert client.get_model() == client.get_model("tiny") == model
    with pytest.raises(NotFoundError) as caught:
        client.get_model("nope")
    assert caught.value.reason == "MODEL_NOT_FOUND"


def test_the_clients_model_is_the_calls_default(live_server: LiveServer) -> None:
    with Client(live_server.target, model="nope") as client:
        with pytest.raises(NotFoundError):
            client.tokenize("x")
        assert client.tokenize("x", model="tiny").rendered == "x"


def test_a_refused_field_is_named(client: Client) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        list(client.generate("x", top_p=7))
    assert caught.value.reason == "INVALID_REQUEST"
    (violation,) = caught.value.fields
    assert isinstance(violation, FieldViolation)
    assert violation.field == "sampling.top_p"
    assert str(caught.value).count("sampling.top_p") == 1


def test_closing_frees_the_servers_work(client: Client, live_server: LiveServer) -> None:
    since = live_server.steps()
    chunks = client.generate(token_ids=[5], max_tokens=LONG, temperature=0)
    next(chunks)
    assert live_server.stats()["sequences"] == 1
    chunks.close()
    assert list(chunks) == []
    live_server.wait_freed(since)


def test_leaving_the_with_block_frees_the_servers_work(client: Client, live_server: LiveServer) -> None:
    since = live_server.steps()
    with client.generate(token_ids=[5], max_tokens=LONG, temperature=0) as chunks:
        next(chunks)
    live_server.wait_freed(since)


def test_dropping_the_iterator_frees_the_servers_work(client: Client, live_server: LiveServer) -> None:
    since = live_server.steps()
    for _ in client.generate(token_ids=[5], max_tokens=LONG, temperature=0):
        break
    live_server.wait_freed(since)


def test_closing_from_another_thread_ends_the_iteration(client: Client) -> None:
    chunks = client.generate(token_ids=[5], max_tokens=LONG, temperature=0)
    next(chunks)
    timer = threading.Timer(0.05, chunks.close)
    timer.start()
    assert len(list(chunks)) < LONG / 2
    timer.join()


def test_the_deadline_is_the_callers(client: Client, live_server: LiveServer) -> None:
    with pytest.raises(DeadlineExceededError):
        list(client.generate(token_ids=[5], max_tokens=LONG, temperature=0, timeout=0.1))
    with Client(live_server.target, timeout=0.1) as hasty, pytest.raises(DeadlineExceededError):
        hasty.complete(token_ids=[5], max_tokens=LONG, temperature=0)


def test_ready_servers_are_waited_for(client: Client) -> None:
    client.wait_ready(5)
    client.wait_ready(5, model="tiny")


def test_waiting_for_nobody_ends(unused_port: int) -> None:
    begin = time.monotonic()
    with Client(f"127.0.0.1:{unused_port}") as client, pytest.raises(UnavailableError, match="not ready"):
        client.wait_ready(0.2)
    assert time.monotonic() - begin < 10


def test_an_unknown_model_never_gets_ready(client: Client) -> None:
    with pytest.raises(UnavailableError, match="not ready"):
        client.wait_ready(0.2, model="nope")


def test_many_threads_share_a_client(client: Client) -> None:
    answers: dict[int, tuple[int, ...]] = {}

    def ask(start: int) -> None:
        (completion,) = client.complete(token_ids=[start], max_tokens=4, temperature=0)
        answers[start] = completion.token_ids

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(10, 90, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {start: tuple(range(start + 1, start + 5)) for start in range(10, 90, 10)}


def test_after_close_nothing_works(live_server: LiveServer) -> None:
    client = Client(live_server.target)
    client.close()
    client.close()
    with pytest.raises(ValueError, match="closed channel"):
        client.models()


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
