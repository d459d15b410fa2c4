"""A gRPC client at the level of HTTP/2 frames, for what no gRPC library lets one do: not reading, or vanishing."""

from __future__ import annotations

import asyncio

import h2.config
import h2.connection
import h2.events
import h2.settings

from tests.server.support import PATIENCE

Headers = tuple[tuple[str, str], ...]


class RawStream:
    """One call on a connection of its own. With `window`, the server may send so many bytes, then has to wait."""

    def __init__(self, port: int, method: str, *messages: bytes, window: int = 65535, headers: Headers = ()) -> None:
        self._port = port
        self._path = f"/headrace.v1.InferenceService/{method}"
        self._messages = messages
        self._headers = headers
        self._data = bytearray()
        self._connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        codes = h2.settings.SettingCodes
        settings = {codes.INITIAL_WINDOW_SIZE: window, codes.ENABLE_PUSH: 0}
        self._connection.local_settings = h2.settings.Settings(client=True, initial_values=settings)
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Connect and send the whole request; read nothing."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        connection = self._connection
        connection.initiate_connection()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", self._path),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *self._headers,
        ]
        connection.send_headers(1, headers)
        for index, message in enumerate(self._messages, 1):
            framed = b"\0" + len(message).to_bytes(4, "big") + message
            connection.send_data(1, framed, end_stream=index == len(self._messages))
        self._writer.write(connection.data_to_send())
        await self._writer.drain()

    async def read_to_end(self) -> dict[str, str]:
        """Open the window and read until the trailers, which are returned."""
        assert self._writer is not None
        self._connection.increment_flow_control_window(1 << 24, 1)
        self._connection.increment_flow_control_window(1 << 24)
        while True:
            self._writer.write(self._connection.data_to_send())
            data = await asyncio.wait_for(self._reader.read(1 << 16), PATIENCE)
            assert data, "the server hung up"
            for event in self._connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    self._data += event.data
                elif isinstance(event, h2.events.TrailersReceived) or _is_trailers_only(event):
                    return {_text(key): _text(value) for key, value in event.headers}
                assert not isinstance(event, h2.events.StreamReset), event

    def messages(self) -> list[bytes]:
        """The messages read so far."""
        messages = []
        data = bytes(self._data)
        while data:
            size = int.from_bytes(data[1:5], "big")
            messages.append(data[5 : 5 + size])
            data = data[5 + size :]
        return messages

    def abort(self) -> None:
        """Vanish: close the socket without a word."""
        assert self._writer is not None
        self._writer.transport.abort()


def _is_trailers_only(event: h2.events.Event) -> bool:
    return isinstance(event, h2.events.ResponseReceived) and any(
        _text(key) == "grpc-status" for key, _ in event.headers
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
