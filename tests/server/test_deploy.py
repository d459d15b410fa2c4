"""What deploy/ ships for Prometheus and Grafana asks for metrics that there are; promtool finds nothing to mend."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from headrace.engine.types import EngineStats, FinishOutput, StepRecord
from headrace.server import errors, metrics
from headrace.server.telemetry import Work
from opentelemetry.context import Context
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import CollectorRegistry

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "headrace.rules.yaml"
DASHBOARD = DEPLOY / "grafana" / "headrace.json"


@pytest.fixture
def given() -> Iterator[set[str]]:
    """Names of all samples that a server with a busy past shows."""
    registry = CollectorRegistry()
    provider = MeterProvider([PrometheusMetricReader(registry=registry, scope_info_enabled=False)])
    metrics.install(provider)
    unwatch = metrics.watch(metrics.Source("m", lambda: EngineStats(num_total_blocks=4), lambda: 0))
    metrics.call_ended("headrace.v1.InferenceService/Generate", "OK", "", 0.1)
    metrics.refused(errors.OVERLOADED)
    finish = FinishOutput("length", num_prompt_tokens=3, num_output_tokens=4, decode_seconds=1.0)
    metrics.generation_ended(Work("chat", "m", 0.0, Context()), finish, 1.5)
    metrics.step_ended("m", StepRecord(1, 0.0, 0.1, 8, 1))
    yield {sample.name for family in registry.collect() for sample in family.samples}
    unwatch()
    metrics.install(None)
    provider.shutdown()


def _asked(expressions: list[str]) -> set[str]:
    """Names of metrics (not of recorded series, labels or functions) in PromQL."""
    return {name for text in expressions for name in re.findall(r"\b(?:headrace|gen_ai_server|rpc)_\w+(?=\{|\[)", text)}


def _rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def test_the_rules_ask_for_what_there_is(given: set[str]) -> None:
    asked = _asked([rule["expr"] for rule in _rules()])
    assert len(asked) >= 6
    assert asked <= given


def test_the_dashboard_asks_for_what_there_is(given: set[str]) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    asked = _asked([target["expr"] for panel in panels for target in panel["targets"]])
    assert len(asked) >= 12
    assert asked <= given


def test_promtool_finds_nothing_to_mend() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("PROMTOOL IS MISSING: the alert rules were not tested; on Debian, apt install prometheus")
    for arguments in (["check", "rules", RULES.name], ["test", "rules", "headrace.rules.test.yaml"]):
        done = subprocess.run([promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
