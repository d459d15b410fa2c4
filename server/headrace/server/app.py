"""Puts the server together, runs it, and takes it down in order.

`start_server` is for tests and embedders, `serve_forever` for the CLI. Shutting down: health says NOT_SERVING at once,
new calls are taken for a lame-duck time (load balancers need it to notice), then the listener closes, what runs may
finish within the drain deadline, the engine exits. A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from headrace.engine.types import EngineStats
from headrace.server import descriptors, loop, metrics, orca, telemetry
from headrace.server.admission import Admission, AdmissionLimits
from headrace.server.config import ServerConfig
from headrace.server.health import Health
from headrace.server.inference import InferenceService
from headrace.server.metrics import Source
from headrace.server.model_host import ModelHost
from headrace.server.models_service import ModelService
from headrace.server.orca import LoadReporter
from headrace.server.reflection import Reflection
from headrace.server.resume import Registry, ResumeLimits
from headrace.server.rpc import Policy, service_handler
from headrace.server.session import SessionService
from headrace.server.spawn import ENGINE_COMMAND, SpawnedEngine
from headrace.server.starter import Starter
from headrace.v1 import inference_pb2, models_pb2

log = logging.getLogger("headrace.server")

_LAST_WORDS_SECONDS = 1.0
_GC_THRESHOLD = 10_000  # allocations between two collections of the youngest; Python's own is 700
_NO_LIMIT = 10.0 * 365 * 86400  # seconds: probes and reflection streams end when their client ends them


class ServerFailedError(Exception):
    """The model cannot be served. The message is for the operator."""


@dataclass(frozen=True)
class RunningServer:
    """A server that listens; its model may still be loading."""

    port: int
    config: ServerConfig
    host: ModelHost
    admission: Admission
    health: Health
    load: LoadReporter
    _changed: list[asyncio.Event]
    _server: grpc.aio.Server

    @property
    def address(self) -> str:
        """host:port, for a channel."""
        name = self.config.host
        return f"[{name}]:{self.port}" if ":" in name else f"{name}:{self.port}"

    async def wait_ready(self) -> None:
        """Until the model answers. Raises ServerFailedError where it never will."""
        while self.host.state != "ready":
            if self.host.state == "failed":
                raise ServerFailedError(self.host.failure)
            await self.changed()

    async def changed(self) -> None:
        """Until the model's state or progress changes next."""
        await self._changed[0].wait()

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """Stop serving in order; returns when no call is left. `hurry`: set it to skip the waiting."""
        hurry = hurry or asyncio.Event()
        self.host.drain()
        await _wait(hurry, self.config.lame_duck)
        self.admission.drain()
        stopping = asyncio.ensure_future(self._server.stop(0.0 if hurry.is_set() else self.config.drain_deadline))
        hurried = asyncio.ensure_future(hurry.wait())
        idle = asyncio.ensure_future(self.admission.wait_idle())
        await asyncio.wait((stopping, hurried, idle), return_when=asyncio.FIRST_COMPLETED)
        self.health.end_watches()
        if not stopping.done():  # what is left are last words, and streams that nobody works for (reflection)
            await self._server.stop(0.0 if hurry.is_set() else _LAST_WORDS_SECONDS)
        await stopping
        for task in (hurried, idle):
            task.cancel()


@asynccontextmanager
async def start_server(
    config: ServerConfig,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    first_engine: SpawnedEngine | None = None,
) -> AsyncIterator[RunningServer]:
    """A server that listens at once and loads its model meanwhile; stopped without waiting at the end, unless drained
    before. first_engine: an engine process that was spawned ahead. Raises OSError where the address cannot be had."""
    events = [asyncio.Event()]
    hooks: list[Callable[[], None]] = []

    def on_change() -> None:
        for hook in hooks:
            hook()
        event, events[0] = events[0], asyncio.Event()
        event.set()

    host = ModelHost(config, on_change, engine_command, first_engine)
    admission = Admission(_admission_limits(config))
    server = grpc.aio.server(options=_options(config))
    limits = ResumeLimits(
        config.resume_grace, config.resume_retention, config.resume_bytes, config.stream_buffer_tokens
    )
    resumables = Registry(limits)
    admission.on_drain.add(resumables.abandon_unread)
    pool = descriptors.build_pool()
    load = LoadReporter(host, admission, pool)
    health = _register(server, config, pool, Parts(host, admission, resumables, load))
    hooks.append(lambda: health.set_serving(host.is_serving))

    def on_stats(stats: EngineStats) -> None:
        capacity = host.capacity
        if capacity is not None:
            admission.observe(stats, capacity)

    host.supervisor.on_stats = on_stats
    try:
        port = server.add_insecure_port(
            f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}"
        )
    except RuntimeError:
        raise OSError(f"cannot listen on port {config.port}") from None
    await server.start()
    unwatch = metrics.watch(Source(config.name, host.engine_stats, lambda: host.supervisor.num_restarts))
    model = asyncio.ensure_future(host.run())
    try:
        yield RunningServer(port, config, host, admission, health, load, events, server)
    finally:
        unwatch()
        await server.stop(0)
        await resumables.close()
        model.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await model


def run_server(
    config: ServerConfig,
    on_listen: Callable[[RunningServer], None] | None = None,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    first_engine: SpawnedEngine | None = None,
) -> int:
    """`serve_forever` on an event loop of its own."""
    return loop.run(serve_forever(config, on_listen, engine_command=engine_command, first_engine=first_engine))


async def serve_forever(
    config: ServerConfig,
    on_listen: Callable[[RunningServer], None] | None = None,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    first_engine: SpawnedEngine | None = None,
) -> int:
    """Serve until SIGTERM or SIGINT, or until the model has failed. Returns the process's exit status."""
    stop_telemetry = telemetry.configure(version("headrace"), config.host, config.metrics_port)
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    async with start_server(config, engine_command=engine_command, first_engine=first_engine) as running:
        if on_listen is not None:
            on_listen(running)
        stopped = asyncio.ensure_future(stop.wait())
        failed = asyncio.ensure_future(_until_failed(running))
        await asyncio.wait((stopped, failed), return_when=asyncio.FIRST_COMPLETED)
        status = 0 if stop.is_set() else 1
        stopped.cancel()
        failed.cancel()
        log.info("draining" if status == 0 else "stopping: the model cannot be served")
        await running.drain(hurry)
    await asyncio.to_thread(stop_telemetry)  # last of all: what the drain did is told too
    return status


async def _until_failed(running: RunningServer) -> None:
    is_settled = False
    while running.host.state != "failed":
        if running.host.state == "ready" and not is_settled:
            is_settled = True
            _settle_heap()
        await running.changed()


def _settle_heap() -> None:
    """What was loaded stays: keep the garbage collector from walking it over and over; a heap
    with a vocabulary in it takes it a tenth of a second."""
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD, 20, 20)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)


@dataclass(frozen=True)
class Parts:
    """What the services of a server work with."""

    host: ModelHost
    admission: Admission
    resumables: Registry
    load: LoadReporter


def _register(server: grpc.aio.Server, config: ServerConfig, pool: DescriptorPool, parts: Parts) -> Health:
    """All services of the server, on one wrapper."""
    host, admission = parts.host, parts.admission
    services = [descriptors.INFERENCE, descriptors.MODELS, descriptors.HEALTH, orca.SERVICE]
    if config.enable_channelz:
        services.append(descriptors.CHANNELZ)
    if config.enable_reflection:
        services += [descriptors.REFLECTION, descriptors.REFLECTION_ALPHA]
    policy = Policy(config.default_deadline, config.max_deadline, tenant_header=config.tenant_header, load=parts.load)
    probe = Policy(_NO_LIMIT, _NO_LIMIT, is_logged=False)

    starter = Starter(host)
    session = SessionService(host, admission, starter, config)
    inference = InferenceService(host, admission, starter, session, parts.resumables)
    health = Health(("", *services, config.name), pool)
    inference_descriptor = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
    models_descriptor = models_pb2.DESCRIPTOR.services_by_name["ModelService"]
    handlers = [
        service_handler(inference_descriptor, inference.implementations(), policy),
        service_handler(models_descriptor, ModelService(host).implementations(), policy),
        service_handler(descriptors.service(pool, descriptors.HEALTH), health.implementations(), probe),
        service_handler(descriptors.service(pool, orca.SERVICE), parts.load.implementations(), probe),
    ]
    if config.enable_reflection:
        reflection = Reflection(services, pool).implementations()
        names = (descriptors.REFLECTION, descriptors.REFLECTION_ALPHA)
        handlers += [service_handler(descriptors.service(pool, name), reflection, probe) for name in names]
    server.add_generic_rpc_handlers(tuple(handlers))
    if config.enable_channelz:
        from grpc_channelz.v1 import channelz

        channelz.add_channelz_servicer(server)  # type: ignore[arg-type]  # takes grpc.aio servers too
    return health


def _admission_limits(config: ServerConfig) -> AdmissionLimits:
    return AdmissionLimits(**{field.name: getattr(config, field.name) for field in fields(AdmissionLimits)})


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    """gRPC's settings. Concurrency is limited by our own admission: both of gRPC's limits would hit health checks too,
    or refuse with a code that clients do not retry."""
    return [
        ("grpc.max_receive_message_length", config.max_receive_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", 8 << 10),
        ("grpc.absolute_max_metadata_size", 16 << 10),
        ("grpc.keepalive_time_ms", 10_000),  # a client that vanished is noticed within 15 s
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # Envoy's own keepalive must not be punished
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.max_connection_idle_ms", 300_000),
        ("grpc.max_connection_age_ms", round(config.max_connection_age * 1000)),
        ("grpc.max_connection_age_grace_ms", round((config.max_connection_age_grace or config.max_deadline) * 1000)),
        ("grpc.server_handshake_timeout_ms", 5_000),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_channelz", int(config.enable_channelz)),
    ]
