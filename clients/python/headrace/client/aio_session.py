"""`AsyncSession`: many generations and conversations on one bidirectional stream, for asyncio.

One task reads the stream and hands each event to its generation's queue. A generation that nobody reads is kept in
this process's memory: at most `max_tokens` chunks of it. Commands are sent in the order of the calls and never wait.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from headrace.client import convert, types
from headrace.client.errors import HeadraceError, error_from_rpc, make_error
from headrace.client.routing import Event, SessionRouter, Started
from headrace.v1 import inference_pb2 as pb

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack


class AsyncSessionGeneration:
    """The chunks of one generation of a session, as they come; one task iterates it.

    Raises HeadraceError from the iteration when the generation, or the whole session, fails. Closing it (or leaving
    its `async with` block) cancels it if it still runs.
    """

    def __init__(self, session: AsyncSession) -> None:
        self.id = ""
        self.prompt_tokens: int | None = None  # known from the first chunk on
        self._session = session
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._is_over = False

    def __aiter__(self) -> AsyncIterator[types.Chunk]:
        return self

    async def __anext__(self) -> types.Chunk:
        while not self._is_over:
            event = await self._events.get()
            if isinstance(event, Started):
                self.prompt_tokens = event.prompt_tokens
                continue
            self._is_over = isinstance(event, HeadraceError) or event.finish is not None
            if isinstance(event, HeadraceError):
                raise event
            return event
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Asks for an early end: the last chunk then says `finish.reason == "cancelled"`."""
        self._session.cancel(self.id)

    def interrupt(self, heard_tokens: int | None = None) -> None:
        """Cuts it short within a step, `finish.reason == "interrupted"`; its conversation goes on from the first
        `heard_tokens` of its tokens, or from all that were sent."""
        self._session.interrupt(self.id, heard_tokens)

    def pause(self) -> None:
        """Stands still from the next step on, with its deadline running. Pausing again changes nothing."""
        self._session.pause(self.id)

    def resume(self) -> None:
        """Goes on after a pause, token for token as without it. Changes nothing where it is not paused."""
        self._session.resume(self.id)

    def grant(self, tokens: int) -> None:
        """Lets a generation that was started with `credit` send so many tokens more."""
        self._session.grant(self.id, tokens)

    def update(self, *, max_tokens: int | None = None, stop_conditions: types.StopConditions | None = None) -> None:
        """Changes the limit of generated tokens, counted from the generation's start, or all stop conditions."""
        self._session.update(self.id, max_tokens=max_tokens, stop_conditions=stop_conditions)

    async def aclose(self) -> None:
        """Cancels the generation if it still runs. Idempotent."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class AsyncSession:
    """One bidirectional stream; made by `AsyncClient.session()`, used on its event loop only."""

    def __init__(
        self,
        method: Callable[..., Any],
        options: dict[str, Any],
        *,
        model: str,
        on_command_error: Callable[[HeadraceError], None] | None,
    ) -> None:
        self._model = model
        self._router = SessionRouter(on_command_error)
        self._commands: asyncio.Queue[pb.SessionRequest | None] = asyncio.Queue()
        self._call = method(self._write(), **options)
        self._reader = asyncio.create_task(self._read(), name="headrace-session")

    def start(
        self,
        prompt: str | None = None,
        *,
        messages: types.Messages | None = None,
        token_ids: Sequence[int] | None = None,
        conversation: str = "",
        credit: int | None = None,
        generation_id: str | None = None,
        model: str | None = None,
        label: str = "",
        cache_salt: str = "",
        priority: types.Priority = "standard",
        **sampling: Unpack[types.Sampling],
    ) -> AsyncSessionGeneration:
        """Starts a generation. With a `conversation` name and messages, `append` can go on with it later. With `credit`
        it sends so many tokens and then waits for `grant`."""
        request = convert.make_generate(
            convert.make_prompt(prompt, messages, token_ids),
            sampling,
            model=self._model if model is None else model,
            label=label,
            cache_salt=cache_salt,
            priority=priority,
        )
        generation = self._open(generation_id)
        command = pb.SessionStart(
            generation_id=generation.id, request=request, conversation_id=conversation, credit_tokens=credit
        )
        self._commands.put_nowait(pb.SessionRequest(start=command))
        return generation

    def append(
        self,
        conversation: str,
        messages: str | types.Messages,
        *,
        credit: int | None = None,
        generation_id: str | None = None,
        **sampling: Unpack[types.Sampling],
    ) -> AsyncSessionGeneration:
        """Adds turns (a string is one user turn) to a conversation and generates the answer.

        Without sampling parameters those of the conversation's start hold.
        """
        command = convert.make_append(conversation, messages, sampling)
        generation = self._open(generation_id)
        command.generation_id = generation.id
        if credit is not None:
            command.credit_tokens = credit
        self._commands.put_nowait(pb.SessionRequest(append=command))
        return generation

    def cancel(self, generation_id: str) -> None:
        """Cancels a generation; one that has ended is left alone."""
        self._tell(generation_id, pb.SessionRequest(cancel=pb.SessionCancel(generation_id=generation_id)))

    # What follows changes a running generation; a refusal goes to `on_command_error`, one that has ended is left alone.

    def interrupt(self, generation_id: str, heard_tokens: int | None = None) -> None:
        """As AsyncSessionGeneration.interrupt."""
        self._tell(generation_id, convert.make_interrupt(generation_id, heard_tokens))

    def pause(self, generation_id: str) -> None:
        """As AsyncSessionGeneration.pause."""
        self._tell(generation_id, pb.SessionRequest(pause=pb.SessionPause(generation_id=generation_id)))

    def resume(self, generation_id: str) -> None:
        """As AsyncSessionGeneration.resume."""
        self._tell(generation_id, pb.SessionRequest(resume=pb.SessionResume(generation_id=generation_id)))

    def grant(self, generation_id: str, tokens: int) -> None:
        """As AsyncSessionGeneration.grant."""
        command = pb.SessionCredit(generation_id=generation_id, tokens=tokens)
        self._tell(generation_id, pb.SessionRequest(credit=command))

    def update(
        self,
        generation_id: str,
        *,
        max_tokens: int | None = None,
        stop_conditions: types.StopConditions | None = None,
    ) -> None:
        """As AsyncSessionGeneration.update."""
        self._tell(generation_id, convert.make_update(generation_id, max_tokens, stop_conditions))

    async def ping(self, timeout: float = 10.0) -> types.Pong:
        """Measures the way to the engine and back. Raises DeadlineExceededError after `timeout` seconds."""
        answers: asyncio.Queue[types.Pong | HeadraceError] = asyncio.Queue()
        nonce = self._router.open_ping(answers.put_nowait)
        self._commands.put_nowait(pb.SessionRequest(ping=pb.SessionPing(nonce=nonce)))
        try:
            answer = await asyncio.wait_for(answers.get(), timeout)
        except asyncio.TimeoutError:
            raise make_error(grpc.StatusCode.DEADLINE_EXCEEDED, f"no pong within {timeout:g} s") from None
        if isinstance(answer, HeadraceError):
            raise answer
        return answer

    @property
    def has_ended(self) -> bool:
        """Whether the stream is over, by whichever side; then nothing more can be started on it."""
        return self._router.has_ended

    def drain(self) -> None:
        """Says that no command follows: what runs goes on to its end and can still be iterated."""
        self._commands.put_nowait(None)

    async def aclose(self) -> None:
        """Ends the session and cancels what still runs in it. Idempotent."""
        self._commands.put_nowait(None)
        if self._router.num_running:
            self._call.cancel()
        with contextlib.suppress(asyncio.TimeoutError):
            # Seconds; a server that never answers the half-close is cancelled.
            await asyncio.wait_for(asyncio.shield(self._reader), 5.0)
        self._call.cancel()
        await self._reader

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _tell(self, generation_id: str, command: pb.SessionRequest) -> None:
        if self._router.is_running(generation_id):
            self._commands.put_nowait(command)

    def _open(self, generation_id: str | None) -> AsyncSessionGeneration:
        generation = AsyncSessionGeneration(self)
        generation.id = self._router.open(generation_id, generation._events.put_nowait)
        return generation

    async def _write(self) -> AsyncIterator[pb.SessionRequest]:
        while (command := await self._commands.get()) is not None:
            yield command

    async def _read(self) -> None:
        ended = make_error(grpc.StatusCode.CANCELLED, "the session was closed")
        try:
            async for response in self._call:
                self._router.dispatch(response)
        except grpc.RpcError as error:
            ended = error_from_rpc(error)
        except asyncio.CancelledError:
            if not self._call.cancelled():  # this task was cancelled, not the call
                raise
        finally:
            self._router.end(ended)
            self._commands.put_nowait(None)
