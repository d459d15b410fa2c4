"""A small OpenAI-SSE load client on asyncio streams: prompts as token ids, closed loop. Called by `servers.py`.

Traps it avoids: a server's event may carry several tokens, or none while a character is incomplete, so tokens are
counted by the server's own `usage` and must be what was asked for; the first event that answers counts as the first
token even when its text is empty, which can only favour the peer.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from headrace.server.cli.load import PlannedRequest, Record


async def send(
    port: int, model: str, planned: Sequence[PlannedRequest], concurrency: int, extra: Mapping[str, Any]
) -> list[Record]:
    """Sends everything, `concurrency` at a time, and returns what was seen, in the order of the plan."""
    free = asyncio.Semaphore(concurrency)

    async def send_one(request: PlannedRequest) -> Record:
        async with free:
            record = Record(time.monotonic(), len(request.prompt))
            try:
                await _measure(port, _body(model, request, extra), request.max_tokens, record)
            except (OSError, ValueError, EOFError) as error:
                record.error = f"{type(error).__name__}: {error}"[:200]
            return record

    return await asyncio.gather(*(send_one(request) for request in planned))


def _body(model: str, request: PlannedRequest, extra: Mapping[str, Any]) -> bytes:
    fields = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **extra,
    }
    return json.dumps(fields).encode()


async def _measure(port: int, body: bytes, num_tokens: int, record: Record) -> None:
    """Fills the record: one entry per event. Raises ValueError where the server says less than it was asked for."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    usage: dict[str, int] = {}
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()
        async for event in _events(reader):
            if event.get("error"):
                raise ValueError(str(event["error"]))
            if event.get("choices"):
                record.add(time.monotonic(), 1)
            usage = event.get("usage") or usage
    finally:
        writer.close()
    generated, prompted = usage.get("completion_tokens"), usage.get("prompt_tokens")
    if generated != num_tokens or prompted != record.num_prompt:
        raise ValueError(f"{prompted} prompt and {generated} new tokens, not {record.num_prompt} and {num_tokens}")
    _count(record, num_tokens)


def _count(record: Record, num_tokens: int) -> None:
    """Spread the tokens over the events: which event held which cannot be seen, their sum is the server's own."""
    events = len(record.times)
    if events == 0:
        raise ValueError("no event before the end")
    if events > num_tokens:  # a last event that only says why it ended
        del record.times[num_tokens:], record.counts[num_tokens:]
    record.counts[-1] += num_tokens - len(record.counts)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every `data:` line. Raises ValueError for a status other than 200."""
    status = await reader.readline()
    is_chunked = False
    while (line := await reader.readline()).strip():
        name, _, value = line.decode("latin-1").lower().partition(":")
        is_chunked |= name == "transfer-encoding" and "chunked" in value
    if b" 200" not in status:
        raise ValueError(f"{status.decode('latin-1').strip()} {(await reader.read(300)).decode(errors='replace')}")
    rest = b""
    async for part in _parts(reader, is_chunked):
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            data = line.strip()
            if data.startswith(b"data:") and data != b"data: [DONE]":
                yield json.loads(data[5:])


async def _parts(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """The body as it comes, without the frame of chunks."""
    while True:
        if not is_chunked:
            part = await reader.read(1 << 16)
            if not part:
                return
            yield part
            continue
        head = await reader.readline()
        if not head:
            raise EOFError("the connection ended inside a body")
        size = int(head.split(b";")[0], 16)
        part = await reader.readexactly(size + 2)
        if size == 0:
            return
        yield part[:-2]
