"""ORCA: how loaded this server is, for balancers: after every response, and as a stream for who asks for one.

`rpc.py` puts `LoadReporter.trailer` into the trailers of every call and counts the calls; Envoy's
client_side_weighted_round_robin and gRPC's weighted_round_robin read them (gRFC A51, A58: weight = rps / utilisation).
The descriptors of the two xDS protos (protos/xds) lie beside the contract, out of the process's default pool and of
Python's module names, where another package may bring its own copy of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from headrace.server.admission import Admission
from headrace.server.model_host import ModelHost
from headrace.server.rpc import Call, Implementation

SERVICE = "xds.service.orca.v3.OpenRcaService"
TRAILER = "endpoint-load-metrics-bin"
_REPORT = "xds.data.orca.v3.OrcaLoadReport"
_FRESH_SECONDS = 0.1  # a report is made at most so often
_PROCESS_SECONDS = 1.0  # and the processes are looked at so often
_RATE_SECONDS = 5.0  # memory of the rates
_LEAST_UTILIZATION = 0.001  # balancers ignore a report of 0
_LEAST_INTERVAL, _DEFAULT_INTERVAL = 0.1, 1.0  # seconds between reports of the stream


@dataclass(frozen=True)
class Load:
    """The fields of an OrcaLoadReport that we fill. application: may be over 1, where requests wait."""

    cpu: float = 0.0
    memory: float = 0.0
    application: float = 0.0
    rps: float = 0.0
    eps: float = 0.0
    named: dict[str, float] = field(default_factory=dict)


class Rate:
    """Events per second, with a memory that fades."""

    def __init__(self) -> None:
        self._value = 0.0
        self._at = time.monotonic()

    def add(self) -> None:
        """One event."""
        self._value = self.value() + 1.0 / _RATE_SECONDS

    def value(self) -> float:
        """Now."""
        now = time.monotonic()
        self._value *= math.exp((self._at - now) / _RATE_SECONDS)
        self._at = now
        return self._value


class LoadReporter:
    """Measures, and answers with serialised reports. `measure` may be replaced by a test that needs a certain load."""

    def __init__(self, host: ModelHost, admission: Admission, pool: DescriptorPool) -> None:
        self.measure: Callable[[], Load] = self._measure
        self._host = host
        self._admission = admission
        self._calls, self._failures = Rate(), Rate()
        self._processes = _Processes()
        self._report_class = GetMessageClass(pool.FindMessageTypeByName(_REPORT))
        self._trailer: tuple[tuple[str, bytes], ...] = ()
        self._made_at = -math.inf

    def ended(self, *, is_failure: bool) -> None:
        """A call has ended; is_failure: by the server's fault."""
        self._calls.add()
        if is_failure:
            self._failures.add()

    def trailer(self) -> tuple[tuple[str, bytes], ...]:
        """Trailing metadata with the present load."""
        now = time.monotonic()
        if now - self._made_at >= _FRESH_SECONDS:
            self._trailer = ((TRAILER, self.report().SerializeToString()),)
            self._made_at = now
        return self._trailer

    def report(self) -> Message:
        """An OrcaLoadReport of now."""
        load = self.measure()
        return self._report_class(
            cpu_utilization=load.cpu,
            mem_utilization=load.memory,
            application_utilization=load.application,
            rps_fractional=load.rps,
            eps=load.eps,
            named_metrics=load.named,
        )

    def implementations(self) -> dict[str, Implementation]:
        """Of OpenRcaService, by method name."""
        return {"StreamCoreMetrics": self.stream}

    async def stream(self, request: Message, call: Call) -> None:
        """A report now, and one every interval that the client asked for."""
        interval: Duration = request.report_interval  # type: ignore[attr-defined]
        seconds = max(interval.seconds + interval.nanos / 1e9, 0.0) or _DEFAULT_INTERVAL
        while not self._admission.is_draining:
            await call.write(self.report())
            await asyncio.sleep(max(seconds, _LEAST_INTERVAL))

    def _measure(self) -> Load:
        stats, admitted, capacity = self._host.engine_stats(), self._admission.stats(), self._host.capacity
        cpu, memory = self._processes.look(self._host.supervisor.pid)
        rps, eps = self._calls.value(), self._failures.value()
        if stats is None or capacity is None:
            return Load(cpu, memory, 1.0, rps, eps)  # no engine: as good as full
        kv_use = 1.0 - stats.num_free_blocks / max(1, stats.num_total_blocks)
        compute = admitted.num_sequences / capacity.max_num_seqs
        named = {
            "queue_depth": float(admitted.num_queued),
            "waiting_tokens": float(admitted.num_queued_tokens),
            "kv_cache_use": kv_use,
            "prefix_hit_share": stats.num_prefix_hits / max(1, stats.num_prefix_queries),
            "running": float(stats.num_running),
        }
        return Load(cpu, memory, max(kv_use, compute, _LEAST_UTILIZATION), rps, eps, named)


class _Processes:
    """What the front end and the engine use of the machine's processors and memory, as shares."""

    def __init__(self) -> None:
        self._looked_at = -math.inf
        self._cpu_seconds = 0.0
        self._shares = (0.0, 0.0)

    def look(self, engine_pid: int | None) -> tuple[float, float]:
        """(processor time, memory), at most a second old."""
        now = time.monotonic()
        elapsed = now - self._looked_at
        if elapsed < _PROCESS_SECONDS:
            return self._shares
        import psutil  # a tenth of a second, which the start need not wait for

        cpu_seconds, rss = 0.0, 0
        for pid in (None, engine_pid) if engine_pid else (None,):
            with contextlib.suppress(psutil.Error):  # it ended meanwhile
                process = psutil.Process(pid)
                times = process.cpu_times()
                cpu_seconds += times.user + times.system
                rss += process.memory_info().rss
        used = max(0.0, cpu_seconds - self._cpu_seconds) if math.isfinite(elapsed) else 0.0
        self._looked_at, self._cpu_seconds = now, cpu_seconds
        num_cpus = psutil.cpu_count() or 1
        cpu = used / (elapsed * num_cpus) if used else 0.0
        self._shares = (cpu, rss / psutil.virtual_memory().total)
        return self._shares
