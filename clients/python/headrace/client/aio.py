"""`AsyncClient`: the asyncio client. Make and use it on one event loop; every call runs on the one channel.

async with AsyncClient("127.0.0.1:50051") as client:
    async for chunk in client.generate(messages=[{"role": "user", "content": "Hello"}], max_tokens=64):
        print(chunk.text, end="", flush=True)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
import grpc.aio
from headrace.client import connection, convert, types
from headrace.client.aio_generation import AsyncGeneration, AsyncResumableGeneration
from headrace.client.aio_session import AsyncSession
from headrace.client.connection import Metadata
from headrace.client.errors import HeadraceError, error_from_rpc, make_error
from headrace.client.resume import CANCEL_SECONDS, REPLICA_KEY, Progress
from headrace.v1 import inference_pb2 as pb
from headrace.v1 import inference_pb2_grpc, models_pb2, models_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

T = TypeVar("T")


class AsyncClient:
    """A connection to a Headrace server.

    `target` is a gRPC target ("host:port", "dns:///name:port", "unix:/path"). `tls` is False for plain text, True for
    the system's root certificates, or channel credentials. `metadata` goes with every call. `timeout` (seconds) is
    the deadline of every call that names none; None means no deadline. With `retries`, refused calls are tried again.
    """

    def __init__(
        self,
        target: str = "127.0.0.1:50051",
        *,
        model: str = "",
        tls: bool | grpc.ChannelCredentials = False,
        metadata: Metadata | None = None,
        timeout: float | None = None,
        retries: bool = True,
    ) -> None:
        options = connection.channel_options(retries=retries)
        credentials = connection.make_credentials(tls)
        self._channel = (
            grpc.aio.secure_channel(target, credentials, options)
            if credentials is not None
            else grpc.aio.insecure_channel(target, options)
        )
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._models = models_pb2_grpc.ModelServiceStub(self._channel)
        self._model = model
        self._metadata = metadata
        self._timeout = timeout
        self._cancels: set[asyncio.Future[None]] = set()

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: types.Messages | None = None,
        token_ids: Sequence[int] | None = None,
        model: str | None = None,
        label: str = "",
        cache_salt: str = "",
        priority: types.Priority = "standard",
        timeout: float | None = None,
        metadata: Metadata | None = None,
        resume: bool = False,
        **sampling: Unpack[types.Sampling],
    ) -> AsyncGeneration:
        """Streams the continuation of one prompt (text, messages or token ids) as chunks.

        With `resume`, a broken connection or a server that dies is not seen: the generation goes on, here or on another
        replica, with the very tokens that it would have had. `timeout` is then that of all calls together.
        """
        request = self._request(prompt, messages, token_ids, model, label, cache_salt, priority, sampling)
        if resume:
            progress = Progress(request, self._timeout if timeout is None else timeout)
            return AsyncResumableGeneration(
                self._inference, partial(self._replica_options, metadata), progress, self._cancels
            )
        return AsyncGeneration(self._inference.Generate(request, **self._options(timeout, metadata)))

    async def complete(
        self,
        prompt: str | None = None,
        *,
        messages: types.Messages | None = None,
        token_ids: Sequence[int] | None = None,
        model: str | None = None,
        label: str = "",
        cache_salt: str = "",
        priority: types.Priority = "standard",
        timeout: float | None = None,
        metadata: Metadata | None = None,
        **sampling: Unpack[types.Sampling],
    ) -> list[types.Completion]:
        """The `n` (default 1) whole continuations of one prompt."""
        request = self._request(prompt, messages, token_ids, model, label, cache_salt, priority, sampling)
        call = pb.CompleteRequest(request=request)
        return convert.to_completions(await self._call(self._inference.Complete, call, timeout, metadata))

    def session(
        self,
        *,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
        on_command_error: Callable[[HeadraceError], None] | None = None,
    ) -> AsyncSession:
        """Opens a bidirectional session for many generations and conversations; use it with `async with`.

        `on_command_error` hears of refused cancels and updates; by default they are logged as warnings.
        """
        return AsyncSession(
            self._inference.Session,
            self._options(timeout, metadata),
            model=self._model if model is None else model,
            on_command_error=on_command_error,
        )

    async def tokenize(
        self,
        prompt: str | None = None,
        *,
        messages: types.Messages | None = None,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> types.Tokens:
        """The token ids that `generate` would compute for a text or messages."""
        request = pb.TokenizeRequest(model=self._name(model), prompt=convert.make_prompt(prompt, messages, None))
        return convert.to_tokens(await self._call(self._inference.Tokenize, request, timeout, metadata))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        model: str | None = None,
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        request = pb.DetokenizeRequest(
            model=self._name(model), token_ids=token_ids, skip_special_tokens=skip_special_tokens
        )
        return (await self._call(self._inference.Detokenize, request, timeout, metadata)).text

    async def score(
        self,
        prompt: str | None = None,
        *,
        messages: types.Messages | None = None,
        token_ids: Sequence[int] | None = None,
        top_logprobs: int = 0,
        model: str | None = None,
        label: str = "",
        timeout: float | None = None,
        metadata: Metadata | None = None,
    ) -> types.Scores:
        """How likely the model finds each token of a text after those before it."""
        request = pb.ScoreRequest(
            model=self._name(model),
            prompt=convert.make_prompt(prompt, messages, token_ids),
            top_logprobs=top_logprobs,
            request_label=label,
        )
        return convert.to_scores(await self._call(self._inference.Score, request, timeout, metadata))

    async def models(self, *, timeout: float | None = None, metadata: Metadata | None = None) -> list[types.ModelInfo]:
        """Every model of the server."""
        response = await self._call(self._models.ListModels, models_pb2.ListModelsRequest(), timeout, metadata)
        return [convert.to_model(model) for model in response.models]

    async def get_model(
        self, model: str | None = None, *, timeout: float | None = None, metadata: Metadata | None = None
    ) -> types.ModelInfo:
        """One model; by default the client's, else the server's only one."""
        request = models_pb2.GetModelRequest(model=self._name(model))
        return convert.to_model((await self._call(self._models.GetModel, request, timeout, metadata)).model)

    async def wait_ready(self, timeout: float = 60.0, *, model: str | None = None) -> None:
        """Waits until the server reports SERVING for the model (by default: for the server as a whole).

        Raises UnavailableError when `timeout` seconds have passed.
        """
        watch = self._channel.unary_stream(
            connection.HEALTH_WATCH, connection.encode_health_request, connection.decode_health_response
        )
        request = self._name(model)
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            call = watch(request, timeout=left, wait_for_ready=True)
            try:
                async for status in call:
                    if status == connection.SERVING:
                        return
            except grpc.RpcError as error:
                if error.code() not in connection.TRANSIENT_CODES:
                    raise error_from_rpc(error) from None
            finally:
                call.cancel()
            await asyncio.sleep(min(0.05, max(0.0, end - time.monotonic())))
        raise make_error(grpc.StatusCode.UNAVAILABLE, f"not ready after {timeout:g} s")

    async def aclose(self) -> None:
        """Closes the connection; what still runs on it is cancelled. Idempotent."""
        if self._cancels:
            await asyncio.wait(self._cancels, timeout=CANCEL_SECONDS)
        await self._channel.close(grace=None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _name(self, model: str | None) -> str:
        return self._model if model is None else model

    def _options(self, timeout: float | None, metadata: Metadata | None) -> dict[str, Any]:
        return {
            "timeout": self._timeout if timeout is None else timeout,
            "metadata": connection.merge_metadata(self._metadata, metadata),
        }

    def _replica_options(self, metadata: Metadata | None, timeout: float | None, replica: str) -> dict[str, Any]:
        """Of a call that is to reach the replica of this name; "": any."""
        pairs = connection.merge_metadata(self._metadata, metadata) or ()
        return {"timeout": timeout, "metadata": (*pairs, (REPLICA_KEY, replica)) if replica else pairs or None}

    def _request(
        self,
        prompt: str | None,
        messages: types.Messages | None,
        token_ids: Sequence[int] | None,
        model: str | None,
        label: str,
        cache_salt: str,
        priority: types.Priority,
        sampling: types.Sampling,
    ) -> pb.GenerateRequest:
        return convert.make_generate(
            convert.make_prompt(prompt, messages, token_ids),
            sampling,
            model=self._name(model),
            label=label,
            cache_salt=cache_salt,
            priority=priority,
        )

    async def _call(
        self, method: Callable[..., Awaitable[T]], request: object, timeout: float | None, metadata: Metadata | None
    ) -> T:
        try:
            return await method(request, **self._options(timeout, metadata))
        except grpc.RpcError as error:
            raise error_from_rpc(error) from None
