"""The self-test before SERVING: it passes on sound engines, and each fault that it is there for turns it red."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.engine import Engine
from headrace.kernels.batch import RowResult, StepBatch
from headrace.models.errors import ModelError
from headrace.server import self_test

from tests.server.scripted_engine import CountingExecutor


class Sound(CountingExecutor):
    """Log-probabilities that depend on the token alone, as they must not depend on how it is computed."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def execute(self, batch: StepBatch) -> list[RowResult]:
        return [RowResult(row.token_id, -1.0 - row.token_id / 100, (), True) for row in super().execute(batch)]


class Disagrees(Sound):
    """Single tokens are computed otherwise than prompts."""

    def execute(self, batch: StepBatch) -> list[RowResult]:
        rows = super().execute(batch)
        shift = 0.1 if len(batch.token_ids) == 1 else 0.0
        return [RowResult(row.token_id, row.logprob - shift, (), True) for row in rows]


class NotFinite(Sound):
    def execute(self, batch: StepBatch) -> list[RowResult]:
        return [RowResult(row.token_id, float("nan"), (), False) for row in super().execute(batch)]


class Raises(Sound):
    def execute(self, batch: StepBatch) -> list[RowResult]:
        raise RuntimeError("planted")


def engine(executor: CountingExecutor, **changes: Any) -> Engine:
    config = {"num_blocks": 33, "max_model_len": 256, "max_num_seqs": 4, "vocab_size": 200, **changes}
    return Engine(executor, EngineConfig(**config))


def test_a_sound_engine_passes(tmp_path: Path) -> None:
    self_test.check(engine(Sound()), tmp_path / "unknown.gguf")
    self_test.check(engine(Sound(), max_model_len=20), tmp_path / "unknown.gguf")
    self_test.check(engine(Sound(), max_model_len=6), tmp_path / "unknown.gguf")


@pytest.mark.parametrize(
    ("fault", "words"), [(Disagrees, "how it is computed"), (NotFinite, "NUMERIC"), (Raises, "STEP_FAILED")]
)
def test_faults_are_found(fault: type[Sound], words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=words):
        self_test.check(engine(fault()), tmp_path / "unknown.gguf")


def test_numbers_that_are_not_the_references_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "known.gguf"
    path.write_bytes(b"x" * 100)
    right = self_test.observe(engine(Sound())).prompt
    entry = {"known.gguf": {"file_bytes": 100, "logprobs": right}}
    monkeypatch.setattr(self_test, "files", lambda _: tmp_path)
    (tmp_path / "golden.json").write_text(json.dumps(entry))
    self_test.check(engine(Sound()), path)
    entry["known.gguf"]["logprobs"] = [value - 0.4 for value in right]
    (tmp_path / "golden.json").write_text(json.dumps(entry))
    with pytest.raises(ModelError, match=r"off by 0\.40"):
        self_test.check(engine(Sound()), path)
    path.write_bytes(b"x" * 101)  # another file of that name: nothing is known about it
    self_test.check(engine(Sound()), path)


def test_the_default_model_has_a_golden_entry(smollm2_path: Path) -> None:
    golden = self_test._golden(smollm2_path)
    assert golden is not None
    assert len(golden) == 47
