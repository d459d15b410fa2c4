"""`make mesh`: every claim about Headrace behind Envoy, measured. One line of JSON per claim; `N passed, N failed`.

    make mesh                          all of it
    make mesh ARGS=--quick             the short form, five minutes on two cores, for CI
    make mesh ARGS="resume"            only claims whose text or file contains this word
    make mesh ARGS=--list              name them

The fleets' logs lie in build/mesh/, one folder per claim. Exit status 1 where a claim failed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import pkgutil
import shutil
import sys
import time
import traceback
from pathlib import Path

from tests.mesh import claims
from tests.mesh.claims import Claim, Stage, Verdict

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build" / "mesh"
_CONTEXT = 4096  # tokens: generations that last long enough to be killed
_SMOLLM2 = "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Runs sys.argv; returns the exit status."""
    parser = argparse.ArgumentParser(prog="make mesh", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only claims whose text or file contains one of these")
    parser.add_argument("--quick", action="store_true", help="the short form")
    parser.add_argument("--list", action="store_true", help="name the claims and leave")
    arguments = parser.parse_args()
    chosen = [c for c in _all_claims() if (c.is_quick or not arguments.quick) and _matches(c, arguments.words)]
    if arguments.list:
        for claim in chosen:
            print(f"{'quick' if claim.is_quick else 'full '}  {_file(claim)}: {claim.text}")
        return 0
    if not chosen:
        parser.error("no claim matches")
    tiny, smollm2 = _tiny_model(), _smollm2()
    failed = 0
    for claim in chosen:
        name = claim.run.__name__
        stage = Stage(arguments.quick, WORK / f"{_file(claim)}-{name}", tiny, smollm2)
        failed += not _run(claim, stage)
    print(f"{len(chosen) - failed} passed, {failed} failed", flush=True)
    return 1 if failed else 0


def _run(claim: Claim, stage: Stage) -> bool:
    shutil.rmtree(stage.folder, ignore_errors=True)
    stage.folder.mkdir(parents=True)
    start = time.monotonic()
    try:
        verdict = asyncio.run(_limited(claim, stage))
    except (Exception, asyncio.CancelledError) as error:
        traceback.print_exc(limit=8)
        verdict = Verdict({"error": f"{type(error).__name__}: {error}"[:300]}, passed=False)
    seconds = round(time.monotonic() - start, 1)
    line = {"claim": claim.text, "figure": verdict.figure, "passed": verdict.passed, "seconds": seconds}
    print(json.dumps(line, ensure_ascii=False), flush=True)
    return verdict.passed


async def _limited(claim: Claim, stage: Stage) -> Verdict:
    running = asyncio.ensure_future(claim.run(stage))
    await asyncio.wait((running,), timeout=claim.timeout)
    if running.done():
        return running.result()
    running.cancel()
    await asyncio.wait((running,))
    raise TimeoutError(f"the claim took more than {claim.timeout:g} s")


def _all_claims() -> list[Claim]:
    """In order of the files' names and of the lines in them."""
    for module in sorted(pkgutil.iter_modules(claims.__path__), key=lambda m: m.name):
        importlib.import_module(f"{claims.__name__}.{module.name}")
    return claims.registry.claims


def _matches(claim: Claim, words: list[str]) -> bool:
    return not words or any(word in claim.text or word in _file(claim) for word in words)


def _file(claim: Claim) -> str:
    return claim.run.__module__.rpartition(".")[2]


def _tiny_model() -> Path:
    """A tiny random Llama with a long context, written once into build/."""
    path = WORK / "tiny.gguf"
    if not path.exists():
        from tests.support import tiny_models  # imports torch and transformers: 3 s

        WORK.mkdir(parents=True, exist_ok=True)
        directory = tiny_models.write_directory("llama", WORK / "tiny")
        config = json.loads((directory / "config.json").read_text())
        config["max_position_embeddings"] = _CONTEXT
        (directory / "config.json").write_text(json.dumps(config))
        written = tiny_models.write_gguf(directory, WORK / "tiny.unfinished.gguf", "F32")
        os.replace(written, path)
    return path


def _smollm2() -> Path:
    from headrace.models.catalogue import cache_root

    path = cache_root() / "models" / _SMOLLM2
    if not path.is_file():
        sys.exit("the default model is not in the cache; run `make setup`")
    return path


if __name__ == "__main__":
    sys.exit(main())
