"""bench/gpu.py reaches its end: every phase, tiny, in Triton's interpreter (interpreter only).

Its first run on a GPU has nine minutes; a phase that dies of a wrong argument there costs more than it does here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.machine import IS_INTERPRETED

if not IS_INTERPRETED:
    # On a GPU the script itself is what one runs.
    pytest.skip("a rehearsal is for machines without a GPU", allow_module_level=True)

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.parametrize("phases", [("tune", "times"), ("steps", "server")])
def test_every_phase_reaches_its_end(phases: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rehearse", "--only", *phases], capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [line for line in lines if "error" in line or "skipped" in line or "stopped" in line]
    assert errors == []
    assert {line["name"]: line["outcome"] for line in lines if line["phase"] == "phase"} == dict.fromkeys(
        phases, "done"
    )
    assert lines[-1]["phase"] == "end"
    assert done.returncode == 0
    if "times" in phases:
        targets = {line["target"] for line in lines if line["phase"] == "targets" and line["measured"]}
        assert len(targets) == 3  # the fourth needs graphs
        assert "SKIPPED PEER vllm-marlin" in done.stderr
