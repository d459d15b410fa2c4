"""Where spans and metrics go: OTLP over gRPC, and an HTTP endpoint that Prometheus scrapes. Imported only where wanted.

The SDK reads the usual OTEL_* variables by itself: endpoint, headers, sampler, intervals, resource attributes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from headrace.server import metrics, telemetry
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

log = logging.getLogger("headrace.server")

_LAST_WORDS_MILLISECONDS = 2000


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
        provider = MeterProvider(metric_readers=readers, resource=resource)
        metrics.install(provider)
        stops.append(lambda: provider.shutdown(_LAST_WORDS_MILLISECONDS))

    def stop_all() -> None:
        metrics.install(None)
        for stop in reversed(stops):
            stop()

    return stop_all


def _start_traces(resource: Resource) -> Callable[[], None]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    telemetry.use_provider(provider)

    def stop() -> None:
        provider.force_flush(_LAST_WORDS_MILLISECONDS)
        provider.shutdown()

    return stop


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
