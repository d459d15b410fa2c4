"""Hypothesis profiles of the engine tests, chosen by HEADRACE_HYPOTHESIS: "quick" (default) or "ci"."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

_COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", settings(max_examples=100, stateful_step_count=50, **_COMMON))
settings.register_profile("ci", settings(max_examples=2000, stateful_step_count=100, **_COMMON))
settings.load_profile(os.environ.get("HEADRACE_HYPOTHESIS", "quick"))
