"""What `Client.generate` returns: the chunks of one call, or, with `resume`, of as many calls as it takes.

What to do about a failure is decided by `resume.Progress`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from headrace.client import convert, types
from headrace.client.errors import error_from_rpc
from headrace.client.resume import CANCEL_SECONDS, REPLICA_KEY, Ask, Progress
from headrace.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self

Options = Callable[[float | None, str], dict[str, Any]]  # (timeout, replica) -> timeout and metadata of a call


class Generation:
    """The chunks of one Generate call, as they come. Close it, or leave its `with` block, to free the server's work.

    Raises HeadraceError from the iteration when the call fails.
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._is_closed = False

    @property
    def num_resumed(self) -> int:
        """Calls after the first; 0 without `resume`."""
        return 0

    def __iter__(self) -> Iterator[types.Chunk]:
        return self

    def __next__(self) -> types.Chunk:
        if self._is_closed:
            raise StopIteration
        try:
            response: pb.GenerateResponse = next(self._call)
        except StopIteration:
            self._is_closed = True
            raise
        except grpc.RpcError as error:
            was_closed, self._is_closed = self._is_closed, True
            if was_closed:  # closed by another thread while this one waited
                raise StopIteration from None
            raise error_from_rpc(error) from None
        return convert.to_chunk(response.chunk)

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        self._is_closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class ResumableGeneration(Generation):
    """The chunks of one generation, over lost connections and dead servers.

    Raises HeadraceError from the iteration when nothing helps any more.
    """

    def __init__(self, stub: Any, options: Options, progress: Progress, cancels: set[Any]) -> None:
        """cancels: holds the calls that tell the server of a cancellation; the client waits for them when it closes."""
        self._cancels = cancels
        self._stub = stub
        self._options = options
        self._progress = progress
        self._closed = threading.Event()
        self._call: Any = stub.Generate(progress.first(), **options(progress.seconds_left(), ""))

    @property
    def num_resumed(self) -> int:
        """Calls after the first."""
        return self._progress.num_resumed

    def __next__(self) -> types.Chunk:
        progress = self._progress
        while not self._closed.is_set() and not progress.is_finished:
            try:
                response = next(self._call)
            except StopIteration:
                failure = progress.broken_off()
            except grpc.RpcError as error:
                if self._closed.is_set():  # closed by another thread while this one waited
                    break
                failure = error_from_rpc(error)
            else:
                return self._took(response.chunk)
            self._ask(self._next(failure))
        self._closed.set()
        raise StopIteration

    def _next(self, failure: Exception) -> Ask:
        try:
            return self._progress.after(failure)  # type: ignore[arg-type]
        except Exception:
            self._closed.set()
            raise

    def close(self) -> None:
        """Cancels what still runs. Idempotent."""
        was_closed = self._closed.is_set()
        self._closed.set()
        self._call.cancel()
        progress = self._progress
        if not was_closed and progress.generation_id and not progress.is_finished:
            request = pb.CancelRequest(generation_id=progress.generation_id)
            telling = self._stub.Cancel.future(request, **self._options(CANCEL_SECONDS, progress.replica))
            self._cancels.add(telling)
            telling.add_done_callback(self._cancels.discard)

    def _took(self, chunk: pb.GenerationChunk) -> types.Chunk:
        progress = self._progress
        is_first = chunk.generation_id != progress.generation_id
        progress.take(chunk)
        if is_first:
            progress.replica = dict(self._call.initial_metadata() or ()).get(REPLICA_KEY, "") or progress.replica
        return convert.to_chunk(chunk)

    def _ask(self, ask: Ask) -> None:
        if self._closed.wait(ask.delay):
            return
        progress = self._progress
        method = self._stub.Resume if isinstance(ask.request, pb.ResumeRequest) else self._stub.Generate
        self._call = method(ask.request, **self._options(progress.seconds_left(), progress.replica))
