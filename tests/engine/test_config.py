"""Limits that cannot work are refused, all at once."""

from __future__ import annotations

import pytest
from headrace.engine.config import EngineConfig
from headrace.engine.errors import ConfigError


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(num_blocks=1, max_model_len=0, max_num_seqs=8, max_num_batched_tokens=4, max_logit_rows=2)
    assert caught.value.problems == (
        "num_blocks must be at least 2",
        "max_model_len must be at least 1",
        "max_num_batched_tokens must be at least max_num_seqs",
        "max_logit_rows must be at least max_num_seqs",
    )
    assert str(caught.value) == "; ".join(caught.value.problems)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_waiting_tokens": 99}, "max_waiting_tokens"),
        ({"num_blocks": 2**27 + 1}, "32-bit"),
        ({"block_size": 0}, "block_size"),
        ({"max_waiting_seqs": 0}, "max_waiting_seqs"),
        ({"vocab_size": -1}, "vocab_size"),
    ],
)
def test_a_single_problem(changes: dict[str, int], word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        EngineConfig(**{"num_blocks": 100, "max_model_len": 100, **changes})  # type: ignore[arg-type]
    assert len(caught.value.problems) == 1


def test_a_sequence_is_bounded_by_the_model_and_by_the_pool() -> None:
    assert EngineConfig(num_blocks=100, max_model_len=64).max_sequence_len == 64
    assert EngineConfig(num_blocks=4, max_model_len=64).max_sequence_len == 48  # block 0 cannot be used
