"""A few thousand mutated GGUF files: each opens or is refused, at a bounded cost, and nothing else happens."""

from __future__ import annotations

from tests.models.fuzz_gguf import run

CASES = 3000


def test_mutated_files_open_or_are_refused_at_bounded_cost() -> None:
    outcome = run(CASES, seed=20240229)
    assert outcome.opened + sum(outcome.refused.values()) == CASES
    # Both happen often and in many ways: the mutations neither miss the checks nor all die at the first one.
    assert outcome.opened > CASES // 20
    assert len(outcome.refused) > 40
    assert outcome.peak_bytes < 2**20
    assert outcome.cpu_seconds < 1.0
