"""Where spans and metrics go: OTLP over gRPC, and an HTTP endpoint that Prometheus scrapes. Imported only where wanted.

The SDK reads the usual OTEL_* variables by itself: endpoint, headers, sampler, intervals, resource attributes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from headrace.server import metrics, telemetry
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("headrace.server")

_LAST_WORDS_SECONDS = 3.0


def start(service_version: str, *, traces: bool, otlp_metrics: bool, host: str, port: int) -> Callable[[], None]:
    """See `telemetry.configure`."""
    resource = Resource.create({"service.name": "headrace", "service.version": service_version})
    stops: list[Callable[[], object]] = []
    if traces:
        stops.append(_start_traces(resource))
    readers: list[MetricReader] = []
    if otlp_metrics:
        readers.append(_otlp_reader())
    if port:
        reader, stop = _prometheus(host, port)
        readers.append(reader)
        stops.append(stop)
    if readers:
        provider = MeterProvider(metric_readers=readers, resource=resource, shutdown_on_exit=False)
        metrics.install(provider)
        stops.append(provider.shutdown)

    def stop_all() -> None:
        for stop in reversed(stops):
            stop()

    def stop_in_time() -> None:
        """An exporter with a dead collector tries again for a minute, whatever time-out it is given; a server that
        ends does not wait for that."""
        metrics.install(None)
        thread = threading.Thread(target=stop_all, name="telemetry-stop", daemon=True)
        thread.start()
        thread.join(_LAST_WORDS_SECONDS)
        if thread.is_alive():
            log.warning("the collector does not answer: the last spans and metrics are lost")

    return stop_in_time


def _start_traces(resource: Resource) -> Callable[[], None]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    telemetry.use_provider(provider)
    return provider.shutdown  # sends what is left


def _otlp_reader() -> MetricReader:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    return PeriodicExportingMetricReader(OTLPMetricExporter())


def _prometheus(host: str, port: int) -> tuple[MetricReader, Callable[[], None]]:
    from opentelemetry.exporter.prometheus import PrometheusMetricReader
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()  # not the process-wide one: nothing but ours is shown
    reader = PrometheusMetricReader(registry=registry, scope_info_enabled=False)
    server, thread = start_http_server(port, host, registry)
    log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return reader, stop
