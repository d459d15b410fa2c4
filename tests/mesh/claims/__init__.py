"""The claims of `make mesh`: what Headrace promises behind a real Envoy, each a coroutine that measures and judges.

A claim is a function in a file of this folder:

    @claim("a cancelled call stops in the engine behind Envoy")
    async def cancelled(stage: Stage) -> Verdict:
        async with stage.fleet(3) as fleet:
            ...
        return Verdict({"steps": steps}, passed=steps < 200)

`tests.mesh.run` imports all files, runs the claims one after the other, and prints one line of JSON for each. A claim
that raises has failed. In the short form (`--quick`, five minutes in all) claims with quick=False are left out, and the
others ask `stage.is_quick` how much to do.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.mesh import fleet as fleets


@dataclass(frozen=True)
class Verdict:
    """What was measured, as JSON, and whether the claim holds."""

    figure: dict[str, Any]
    passed: bool


@dataclass(frozen=True)
class Stage:
    """Where a claim runs. folder: for its files and logs; kept when it fails."""

    is_quick: bool
    folder: Path
    tiny: Path  # a tiny random model of 4,096 tokens of context, made on the spot
    smollm2: Path  # the default model

    def fleet(
        self, num_replicas: int, *options: str, model: Path | None = None, **settings: Any
    ) -> AbstractAsyncContextManager[fleets.Fleet]:
        """So many processes of `headrace serve` on the tiny model (or `model`) behind Envoy, all ready and healthy.
        options: of `headrace serve`. settings: see `fleets.start`."""
        return fleets.start(num_replicas, model or self.tiny, self.folder, options, **settings)


Run = Callable[[Stage], Awaitable[Verdict]]


@dataclass(frozen=True)
class Claim:
    """A promise and how to check it. timeout: seconds, on a busy machine."""

    text: str
    run: Run
    is_quick: bool
    timeout: float


@dataclass
class _Registry:
    claims: list[Claim] = field(default_factory=list)


registry = _Registry()


def claim(text: str, *, quick: bool = True, timeout: float = 300.0) -> Callable[[Run], Run]:
    """Make a function a claim. quick: it is a part of the short form too."""

    def register(run: Run) -> Run:
        registry.claims.append(Claim(text, run, quick, timeout))
        return run

    return register
