"""Vocabularies that make no sense are refused with a TokenizerError, quickly, whatever is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from headrace.models import tokenizer_gguf, tokenizer_parts
from headrace.models.errors import TokenizerError
from headrace.models.tokenizer import Tokenizer

TOKENS = ["<|end|>", "a", "b", "c", "ab", "abc"]
GOOD: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": TOKENS,
    "token_type": np.array([3, 1, 1, 1, 1, 1], dtype=np.int32),
    "merges": ["a b", "ab c"],
    "eos_token_id": 0,
}
SENTENCEPIECE = {**GOOD, "model": "llama", "scores": [0.0, -3.0, -4.0, -5.0, -1.0, -2.0], "bos_token_id": 0}


def load(values: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf({f"tokenizer.ggml.{key}": value for key, value in values.items()})


class Undecodable(Sequence[str]):
    """Strings in a file that are not UTF-8: they fail when they are read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: Any) -> Any:
        return b"\xff".decode()

    def __iter__(self) -> Iterator[str]:
        yield "a"
        yield b"\xff".decode()


def test_the_vocabulary_that_the_cases_below_break() -> None:
    assert load(GOOD).encode("abcab", add_bos=False, parse_special=False) == [5, 4]
    assert load({**SENTENCEPIECE, "add_space_prefix": False}).encode("abcab", add_bos=False, parse_special=False) == [
        5,
        4,
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", []),
        ("tokens", "abc"),
        ("tokens", 5),
        ("tokens", [1, 2, 3, 4, 5, 6]),
        ("tokens", np.arange(6)),
        ("tokens", ["<|end|>", "a", "b", "a", "ab", "abc"]),
        ("tokens", ["<|end|>", "a", "b", "c", "ab", "a" * 5000]),
        ("tokens", TOKENS[:5]),
        ("tokens", Undecodable()),
        ("token_type", np.array([3, 1, 1, 1, 1], dtype=np.int32)),
        ("token_type", np.array([3, 1, 1, 1, 1, 7], dtype=np.int32)),
        ("token_type", np.array([3, 1, 1, 1, 1, -1], dtype=np.int32)),
        ("token_type", 3),
        ("token_type", ["3"] * 6),
        ("token_type", [True] * 6),
        ("merges", ["a b", "abc"]),
        ("merges", ["a b", " "]),
        ("merges", ["a b", "ab "]),
        ("merges", ["a z"]),
        ("merges", ["b c"]),
        ("merges", [b"a b"]),
        ("merges", Undecodable()),
        ("eos_token_id", 6),
        ("eos_token_id", -1),
        ("eos_token_id", 2**32 - 1),
        ("eos_token_id", 0.0),
        ("eos_token_id", True),
        ("eos_token_id", "0"),
        ("eot_token_id", 6),
        ("bos_token_id", 6),
        ("add_bos_token", 1),
        ("add_bos_token", True),  # without a start token
        ("model", 5),
        ("pre", 5),
    ],
)
def test_a_broken_byte_level_vocabulary_is_refused(key: str, value: Any) -> None:
    with pytest.raises(TokenizerError):
        load({**GOOD, key: value})


@pytest.mark.parametrize("key", ["tokens", "merges"])
def test_a_missing_list_is_refused(key: str) -> None:
    with pytest.raises(TokenizerError, match=key):
        load({name: value for name, value in GOOD.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scores", [0.0] * 5),
        ("scores", [0.0, -1.0, float("nan"), 0.0, 0.0, 0.0]),
        ("scores", [0.0, -1.0, float("inf"), 0.0, 0.0, 0.0]),
        ("scores", "scores"),
        ("unknown_token_id", 6),
        ("token_type", np.array([3, 1, 1, 1, 1, 6], dtype=np.int32)),  # "abc" is not <0xNN>
        ("add_space_prefix", "yes"),
    ],
)
def test_a_broken_sentencepiece_vocabulary_is_refused(key: str, value: Any) -> None:
    with pytest.raises(TokenizerError):
        load({**SENTENCEPIECE, key: value})


def test_two_tokens_with_one_text_are_refused_even_where_nothing_else_counts_them() -> None:
    silent = {key: value for key, value in GOOD.items() if key != "token_type"}
    with pytest.raises(TokenizerError, match="1 and 3 have the same text"):
        load({**silent, "tokens": ["<|end|>", "a", "b", "a", "ab", "abc"]})


def test_written_out_bytes_do_not_merge_into_a_byte_token() -> None:
    tokens = ["<|end|>", "<0x0A>", *"<0xA>", "<0", "<0x", "<0x0", "<0x0A"]
    types = [3, 6] + [1] * (len(tokens) - 2)
    scores = [-float(index) for index in range(len(tokens))]
    values = {**SENTENCEPIECE, "tokens": tokens, "token_type": types, "scores": scores, "add_space_prefix": False}
    tokenizer = load(values)
    ids = tokenizer.encode("<0x0A>", add_bos=False, parse_special=False)
    assert [tokenizer.token_text(index) for index in ids] == ["<0x0A", ">"]


def test_limits_on_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_parts, "MAX_TOKENS", 5)
    with pytest.raises(TokenizerError, match="more than 5 tokens"):
        load(GOOD)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_gguf, "MAX_MERGES", 1)
    with pytest.raises(TokenizerError, match="more than 1 merges"):
        load(GOOD)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_parts, "MAX_VOCABULARY_CHARS", 10)
    with pytest.raises(TokenizerError, match="too long"):
        load(GOOD)
    monkeypatch.undo()
    monkeypatch.setattr(tokenizer_gguf, "_MAX_SPLITS", 3)
    with pytest.raises(TokenizerError, match="too long"):
        load(SENTENCEPIECE)


def test_an_empty_token_gets_a_name_and_no_text_becomes_it() -> None:
    tokenizer = load({**GOOD, "tokens": ["<|end|>", "a", "b", "c", "ab", ""], "merges": ["a b"]})
    assert tokenizer.token_text(5) == "[EMPTY_5]"


def test_without_token_types_the_end_token_is_still_a_control_token() -> None:
    tokenizer = load({key: value for key, value in GOOD.items() if key != "token_type"})
    assert tokenizer.is_special(0)
    assert tokenizer.encode("<|end|>", add_bos=False, parse_special=True) == [0]
