"""One served model: its files resolved, its tokeniser and template here, its engine in another process.

`app.py` makes one and runs it; the servicers ask it for what they need and get a ServerError while the model cannot
answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from headrace.engine.types import EngineStats
from headrace.models.digest import model_digest
from headrace.models.errors import ModelError
from headrace.models.load import FrontModel, ModelInfo, load_front
from headrace.models.sources import resolve
from headrace.server import errors, frames
from headrace.server.config import ServerConfig
from headrace.server.engine_client import EngineClient
from headrace.server.errors import ServerError
from headrace.server.forecast import Capacity
from headrace.server.prompts import Prompts
from headrace.server.spawn import ENGINE_COMMAND, SpawnedEngine
from headrace.server.supervisor import EngineState, Supervisor
from headrace.server.template_worker import TemplateWorker
from headrace.server.validate import Limits

log = logging.getLogger("headrace.server")
T = TypeVar("T")


@dataclass(frozen=True)
class Identity:
    """What the model is, as hashes (`headrace.models.digest`)."""

    model_digest: str
    tokenizer_digest: str


class ModelHost:
    """The model's life, from "not found yet" to "drained"."""

    def __init__(
        self,
        config: ServerConfig,
        on_change: Callable[[], None],
        engine_command: Sequence[str] = ENGINE_COMMAND,
        first_engine: SpawnedEngine | None = None,
    ) -> None:
        """on_change: called on the event loop whenever `state` may have changed. first_engine: as in Supervisor."""
        self.name = config.name
        self.supervisor = Supervisor(config, on_change, engine_command, first_engine)
        self._config = config
        self._on_change = on_change
        self._front: FrontModel | None = None
        self._identity: Identity | None = None
        self._prompts: Prompts | None = None
        self._failure = ""
        self._is_draining = False

    @property
    def failure(self) -> str:
        """Why the model cannot be served; for the operator, never for a client. Empty while it may be."""
        return self._failure or self.supervisor.failure

    @property
    def state(self) -> str:
        """ "loading", "ready", "failed" or "draining"."""
        if self._is_draining:
            return "draining"
        if self.failure:
            return "failed"
        is_ready = self._identity is not None and self.supervisor.state is EngineState.READY
        return "ready" if is_ready else "loading"

    @property
    def is_serving(self) -> bool:
        """Whether new requests should come here: ready, and the engine makes progress."""
        return self.state == "ready" and not self.supervisor.is_stalled

    @property
    def info(self) -> ModelInfo | None:
        """What the model's file says; None until it is read."""
        return self._front.info if self._front is not None else None

    @property
    def context_length(self) -> int:
        """Most tokens of a sequence; 0 until the engine has said so."""
        return self.supervisor.ready.max_model_len if self.supervisor.ready is not None else 0

    @property
    def backend(self) -> str:
        """What runs the model."""
        return self.supervisor.ready.backend if self.supervisor.ready is not None else ""

    @property
    def progress(self) -> float:
        """Share of the weights read, 0 to 1."""
        return 1.0 if self.supervisor.state is EngineState.READY else self.supervisor.progress

    async def run(self) -> None:
        """Load, then keep the engine alive. Returns when the model has FAILED; cancel it to stop the engine."""
        engine: asyncio.Task[None] | None = None
        try:
            path = await _in_daemon_thread(lambda: resolve(self._config.model))
            engine = asyncio.ensure_future(self.supervisor.run(load_frame(self._config, path)))
            front, digest = await asyncio.gather(
                _in_daemon_thread(lambda: load_front(path)), _in_daemon_thread(lambda: model_digest(path))
            )
            self._front = front
            self._identity = Identity(digest, await _in_daemon_thread(front.tokenizer.digest))
            self._prompts = Prompts(self._front.tokenizer, self._template_worker(self._front))
            self._on_change()
            await engine
        except ModelError as error:
            self._failure = str(error)
            log.error("the model cannot be served: %s", error)
            self._on_change()
        finally:
            if engine is not None:
                engine.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await engine
            if self._prompts is not None:
                await self._prompts.close()

    def drain(self) -> None:
        """Nothing new from now on; what runs goes on."""
        self._is_draining = True
        self._on_change()

    def prompts(self) -> Prompts:
        """Templates and tokeniser. Raises ServerError while there are none."""
        if self._prompts is None:
            raise self._refusal()
        return self._prompts

    def front(self) -> FrontModel:
        """Tokeniser and file facts. Raises ServerError while there are none."""
        if self._front is None:
            raise self._refusal()
        return self._front

    def engine_stats(self) -> EngineStats | None:
        """The engine's counts after its last step; None while there is none."""
        client = self.supervisor.client
        return client.stats if client is not None else None

    @property
    def capacity(self) -> Capacity | None:
        """What the engine can do at once; None until it has said so."""
        ready = self.supervisor.ready
        if ready is None:
            return None
        kv_tokens = ready.stats.num_total_blocks * ready.block_size
        return Capacity(ready.max_num_seqs, ready.max_num_batched_tokens, kv_tokens)

    def client(self) -> EngineClient:
        """The engine. Raises ServerError while none answers."""
        client = self.supervisor.client
        if client is None or self._identity is None or self._failure:
            raise self._refusal()
        return client

    def identity(self) -> Identity:
        """The model's hashes. Raises ServerError until they are known."""
        if self._identity is None:
            raise self._refusal()
        return self._identity

    @property
    def arithmetic(self) -> str:
        """What decides the bits of the logits, besides the model; "" where the engine does not say."""
        return self.supervisor.ready.arithmetic if self.supervisor.ready is not None else ""

    def limits(self) -> Limits:
        """What the model allows. Raises ServerError until that is known."""
        if not self.context_length:
            raise self._refusal()
        return Limits(self.context_length, self.front().info.vocab_size)

    def _refusal(self) -> ServerError:
        if self.failure:
            return ServerError(errors.MODEL_FAILED)
        return ServerError(errors.MODEL_LOADING, retry_after=1.0)

    @staticmethod
    def _template_worker(front: FrontModel) -> TemplateWorker | None:
        if front.chat_template is None:
            return None
        template = front.chat_template
        return TemplateWorker(template.source, template.bos_token, template.eos_token)


def load_frame(config: ServerConfig, path: Path) -> frames.Load:
    """What the engine process is told to load, and how to run it; benches build their engines from it too."""
    return frames.Load(
        path=str(path),
        block_size=config.block_size,
        num_blocks=config.num_blocks,
        kv_cache_bytes=config.kv_cache_bytes,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        max_live_sequences=config.max_live_sequences,
        max_live_tokens=config.max_live_tokens,
        num_threads=config.num_threads,
        enable_prefix_cache=config.enable_prefix_cache,
        backend=config.backend,
        kv_dtype=config.kv_dtype,
        activation_bits=16 if config.activation_bits == 16 else 8,
        kv_cache_tokens=config.kv_cache_tokens,
        compute_dtype=config.compute_dtype,
        attention=config.attention,
        gpu_memory_fraction=config.gpu_memory_fraction,
        swap_space_bytes=int(config.swap_space_gb * (1 << 30)),
        quantization=config.quantization,
    )


async def _in_daemon_thread(work: Callable[[], T]) -> T:
    """Run something long that must not hold up the process's exit: a download, say. asyncio's own threads are
    joined."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if done.cancelled():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await done
