"""The calls that are compiled for every target: host wrappers on meta tensors, at the shapes of real models.

A case is made per target, because a wrapper may choose by it. Called by gate.py and report.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from tests.gpu.aot.targets import Target


@dataclass(frozen=True)
class Case:
    """One call of one op.

    call: launches on meta tensors. matrix: what its inner loop must multiply with: "float" (HMMA, HGMMA, tcgen05,
    MFMA), "many" (of these, on sm_90 and sm_100, not HMMA), "int8" (IMMA and its like), or None. runs_on: targets for
    which the call is meant. is_quick: among those of `make gpu-gates ARGS=--quick`.
    """

    name: str
    call: Callable[[Target], None]
    matrix: str | None = None
    runs_on: Callable[[Target], bool] = lambda target: True
    is_quick: bool = False


@cache
def all_cases() -> dict[str, Case]:
    """By name."""
    return {case.name: case for case in _cases()}


def _cases() -> Iterator[Case]:
    from tests.gpu.aot import cases_attention, cases_linear, cases_others, cases_sample, cases_tuned

    for module in (cases_attention, cases_linear, cases_others, cases_sample, cases_tuned):
        yield from module.cases()
