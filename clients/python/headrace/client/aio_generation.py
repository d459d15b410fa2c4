"""What `AsyncClient.generate` returns: the chunks of one call, or, with `resume`, of as many calls as it takes.

What to do about a failure is decided by `resume.Progress`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from headrace.client import convert, types
from headrace.client.errors import HeadraceError, error_from_rpc
from headrace.client.resume import CANCEL_SECONDS, REPLICA_KEY, Ask, Progress
from headrace.client.sync_generation import Options
from headrace.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncGeneration:
    """The chunks of one Generate call, as they come. Close it, or leave its `async with` block, to free the server's
    work.

    Raises HeadraceError from the iteration when the call fails.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._responses: AsyncIterator[pb.GenerateResponse] = call.__aiter__()
        self._is_closed = False

    @property
    def num_resumed(self) -> int:
        """Calls after the first; 0 without `resume`."""
        return 0

    def __aiter__(self) -> AsyncIterator[types.Chunk]:
        return self

    async def __anext__(self) -> types.Chunk:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            response = await self._responses.__anext__()
        except StopAsyncIteration:
            self._is_closed = True
            raise
        except grpc.RpcError as error:
            self._is_closed = True
            raise error_from_rpc(error) from None
        except asyncio.CancelledError:
            if self._is_closed:  # closed by another task while this one waited
                raise StopAsyncIteration from None
            self._is_closed = True  # gRPC has cancelled the call
            raise
        return convert.to_chunk(response.chunk)

    def cancel(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._is_closed = True
        self._call.cancel()

    async def aclose(self) -> None:
        """Cancels what still runs. Idempotent."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncResumableGeneration(AsyncGeneration):
    """The chunks of one generation, over lost connections and dead servers.

    Raises HeadraceError from the iteration when nothing helps any more.
    """

    def __init__(self, stub: Any, options: Options, progress: Progress, cancels: set[asyncio.Future[None]]) -> None:
        """cancels: holds the tasks that tell the server of a cancellation; the client waits for them when it closes."""
        self._cancels = cancels
        self._stub = stub
        self._options = options
        self._progress = progress
        self._is_closed = False
        self._call: Any = stub.Generate(progress.first(), **options(progress.seconds_left(), ""))
        self._responses = self._call.__aiter__()

    @property
    def num_resumed(self) -> int:
        """Calls after the first."""
        return self._progress.num_resumed

    async def __anext__(self) -> types.Chunk:
        progress = self._progress
        while not self._is_closed and not progress.is_finished:
            failure: HeadraceError
            try:
                response = await self._responses.__anext__()
            except StopAsyncIteration:
                failure = progress.broken_off()
            except grpc.RpcError as error:
                failure = error_from_rpc(error)
            except asyncio.CancelledError:
                if self._is_closed:  # closed by another task while this one waited
                    break
                self.cancel()
                raise
            else:
                return await self._took(response.chunk)
            if not self._is_closed:
                await self._go_on(failure)
        self._is_closed = True
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Cancels what still runs. Idempotent."""
        was_closed, self._is_closed = self._is_closed, True
        self._call.cancel()
        if not was_closed and self._progress.generation_id and not self._progress.is_finished:
            task = asyncio.ensure_future(self._tell())
            self._cancels.add(task)
            task.add_done_callback(self._cancels.discard)

    async def _took(self, chunk: pb.GenerationChunk) -> types.Chunk:
        progress = self._progress
        is_first = chunk.generation_id != progress.generation_id
        progress.take(chunk)
        if is_first:
            metadata = dict(await self._call.initial_metadata() or ())
            progress.replica = str(metadata.get(REPLICA_KEY, "")) or progress.replica
        return convert.to_chunk(chunk)

    async def _go_on(self, failure: HeadraceError) -> None:
        try:
            ask: Ask = self._progress.after(failure)
            await asyncio.sleep(ask.delay)
        except BaseException:
            self._is_closed = True
            raise
        if self._is_closed:
            return
        progress = self._progress
        method = self._stub.Resume if isinstance(ask.request, pb.ResumeRequest) else self._stub.Generate
        self._call = method(ask.request, **self._options(progress.seconds_left(), progress.replica))
        self._responses = self._call.__aiter__()

    async def _tell(self) -> None:
        """Cancel it on the server: the end of the call alone does not. Where that fails, its time of grace ends it."""
        request = pb.CancelRequest(generation_id=self._progress.generation_id)
        with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):
            await self._stub.Cancel(request, **self._options(CANCEL_SECONDS, self._progress.replica))
