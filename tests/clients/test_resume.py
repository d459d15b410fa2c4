"""`generate(resume=True)`: what the caller of a client sees while connections break and servers die."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from headrace.client import AsyncClient, Client, HeadraceError, InvalidRequestError
from headrace.client.errors import make_error
from headrace.client.resume import MAX_ATTEMPTS, Progress
from headrace.v1 import inference_pb2 as pb

from tests.support.live_server import LONG, LiveServer, live_server

WANTED = list(range(6, 156))


@contextlib.contextmanager
def two_servers(model: Path) -> Iterator[tuple[list[LiveServer], str]]:
    """Two servers on one model, and a target that names both."""
    with live_server(model) as first, live_server(model) as second:
        yield [first, second], f"ipv4:{first.target},{second.target}"


def _kill_busy(servers: list[LiveServer]) -> None:
    """The one that generates; the other lives."""
    (busy,) = [server for server in servers if server.stats()["sequences"]]
    busy.kill()


def test_a_server_that_dies_is_not_seen(tiny_llama_gguf: Path) -> None:
    with two_servers(tiny_llama_gguf) as (servers, target), Client(target) as client:
        generation = client.generate(token_ids=[5], max_tokens=150, temperature=0, resume=True)
        chunks = [next(generation) for _ in range(5)]
        _kill_busy(servers)
        chunks += generation
        assert [i for chunk in chunks for i in chunk.token_ids] == WANTED
        assert generation.num_resumed > 0
        finish = chunks[-1].finish
        assert finish is not None
        assert finish.receipt is not None
        (undisturbed,) = client.complete(token_ids=[5], max_tokens=150, temperature=0, seed=finish.seed)
        assert undisturbed.finish.receipt == finish.receipt
        assert undisturbed.text == "".join(chunk.text for chunk in chunks)


async def test_a_server_that_dies_is_not_seen_by_asyncio_either(tiny_llama_gguf: Path) -> None:
    with two_servers(tiny_llama_gguf) as (servers, target):
        async with AsyncClient(target) as client:
            generation = client.generate(token_ids=[5], max_tokens=150, temperature=0, resume=True)
            ids: list[int] = []
            async for chunk in generation:
                if len(ids) > 5 and generation.num_resumed == 0:
                    with contextlib.suppress(ValueError):
                        await asyncio.to_thread(_kill_busy, servers)
                        servers = []
                assert chunk.offset == len(ids)
                ids += chunk.token_ids
            assert ids == WANTED
            assert generation.num_resumed > 0


class _Wire:
    """A TCP proxy whose connections can be cut."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.target = ""

    @contextlib.asynccontextmanager
    async def up(self) -> AsyncIterator[_Wire]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.target = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Every connection breaks, on both sides."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_connection(self._host, int(self._port))
        self._writers += [writer, inner_writer]
        for source, sink in ((reader, inner_writer), (inner_reader, writer)):
            task = asyncio.ensure_future(self._copy(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                sink.write(data)
                await sink.drain()
        sink.close()


async def test_a_broken_connection_attaches_again_to_the_same_generation(live_server: LiveServer) -> None:
    async with _Wire(live_server.target).up() as wire, AsyncClient(wire.target) as client:
        generation = client.generate(token_ids=[5], max_tokens=150, temperature=0, resume=True)
        ids, names = [], set()
        async for chunk in generation:
            ids += chunk.token_ids
            names.add(chunk.generation_id)
            if len(ids) in (10, 60):
                wire.cut()
        assert ids == WANTED
        assert generation.num_resumed > 0
        assert len(names) == 1
    live_server.wait_idle()


async def test_closing_ends_it_on_the_server_at_once(live_server: LiveServer) -> None:
    since = live_server.steps()
    async with AsyncClient(live_server.target) as client:
        async with client.generate(token_ids=[5], max_tokens=LONG, temperature=0, resume=True) as generation:
            await generation.__anext__()
        assert [chunk async for chunk in generation] == []
        await asyncio.to_thread(live_server.wait_freed, since)


def test_closing_the_blocking_one_too(live_server: LiveServer) -> None:
    since = live_server.steps()
    with Client(live_server.target) as client:
        generation = client.generate(token_ids=[5], max_tokens=LONG, temperature=0, resume=True)
        with generation:
            next(generation)
    live_server.wait_freed(since)
    assert list(generation) == []


def test_what_is_wrong_with_a_request_is_raised_at_once(live_server: LiveServer) -> None:
    with Client(live_server.target) as client:
        with pytest.raises(InvalidRequestError):
            next(client.generate("x", top_p=7, resume=True))
        with pytest.raises(ValueError, match="n must be 1"):
            client.generate("x", n=2, resume=True)


def test_a_server_that_stays_away_is_an_error_in_the_end(tiny_llama_gguf: Path) -> None:
    with live_server(tiny_llama_gguf) as server, Client(server.target) as client:
        generation = client.generate(token_ids=[5], max_tokens=LONG, temperature=0, resume=True, timeout=1.5)
        next(generation)
        server.kill()
        with pytest.raises(HeadraceError):
            list(generation)
        assert list(generation) == []


# ---- the policy by itself ----


def _progress(timeout: float | None = None) -> Progress:
    request = pb.GenerateRequest(prompt=pb.Prompt(text="x"), sampling=pb.SamplingParams(max_tokens=9))
    return Progress(request, timeout)


def _chunk(offset: int, *ids: int, name: str = "a") -> pb.GenerationChunk:
    origin = pb.Origin(prompt_hash="p", model_digest="m", arithmetic="n", seed=1, max_tokens=9)
    return pb.GenerationChunk(offset=offset, token_ids=ids, generation_id=name, origin=origin if not offset else None)


def _unavailable(reason: str = "", **facts: object) -> HeadraceError:
    return make_error(grpc.StatusCode.UNAVAILABLE, "gone", reason=reason, **facts)


def test_first_the_same_generation_then_the_tokens_held() -> None:
    progress = _progress()
    progress.take(_chunk(0, 1, 2))
    progress.take(_chunk(2, 3))
    ask = progress.after(_unavailable())
    assert ask.request == pb.ResumeRequest(generation_id="a", next_offset=3)
    assert ask.delay == 0
    ask = progress.after(make_error(grpc.StatusCode.NOT_FOUND, "?", reason="GENERATION_UNKNOWN"))
    assert isinstance(ask.request, pb.GenerateRequest)
    assert list(ask.request.continuation.token_ids) == [1, 2, 3]
    assert ask.request.continuation.arithmetic == "n"
    assert (ask.request.resumable, ask.request.sampling.seed) == (True, progress.first().sampling.seed)
    assert ask.delay == 0


def test_after_a_dead_engine_nothing_can_be_attached_to() -> None:
    progress = _progress()
    progress.take(_chunk(0, 1))
    ask = progress.after(_unavailable("ENGINE_RESTARTED"))
    assert isinstance(ask.request, pb.GenerateRequest)
    assert progress.after(_unavailable("MODEL_LOADING", retry_after=3.0)).delay == 3.0


def test_what_envoy_makes_of_a_killed_server_is_a_broken_connection_and_our_own_errors_are_not() -> None:
    progress = _progress()
    progress.after(make_error(grpc.StatusCode.INTERNAL, "RST_STREAM with error code 2"))
    for code, reason in (
        (grpc.StatusCode.INTERNAL, "NUMERIC"),
        (grpc.StatusCode.ABORTED, "SUPERSEDED"),
        (grpc.StatusCode.FAILED_PRECONDITION, "PROMPT_DIFFERS"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "TIME_LIMIT"),
        (grpc.StatusCode.NOT_FOUND, "GENERATION_UNKNOWN"),
    ):
        with pytest.raises(HeadraceError, match=reason):
            _progress().after(make_error(code, "no", reason=reason))


def test_tries_are_bounded_and_progress_begins_the_count_anew() -> None:
    progress = _progress()
    delays = [progress.after(_unavailable()).delay for _ in range(MAX_ATTEMPTS - 1)]
    assert delays[0] == 0
    assert delays[-1] > delays[1] > 0
    progress.take(_chunk(0, 1))
    for _ in range(MAX_ATTEMPTS - 1):
        progress.after(_unavailable())
    with pytest.raises(HeadraceError):
        progress.after(_unavailable())


def test_a_gap_or_a_token_twice_is_an_error() -> None:
    for offset in (0, 2):
        progress = _progress()
        progress.take(_chunk(0, 1))
        with pytest.raises(HeadraceError, match="DATA_LOSS"):
            progress.take(_chunk(offset, 2))


def test_no_try_after_the_time_is_up() -> None:
    with pytest.raises(HeadraceError):
        _progress(timeout=0.0).after(_unavailable())
