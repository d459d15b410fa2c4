"""Hypothesis profiles of the engine tests, chosen by HEADRACE_HYPOTHESIS: "quick" (default) or "ci"."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

for name, max_examples, num_rules in (("quick", 100, 50), ("ci", 800, 100)):
    settings.register_profile(
        name,
        max_examples=max_examples,
        stateful_step_count=num_rules,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
settings.load_profile(os.environ.get("HEADRACE_HYPOTHESIS", "quick"))
